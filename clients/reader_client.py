"""ReaderClient: a question and its passages -> an Answer, through Triton's gRPC endpoint.

    with ReaderClient("127.0.0.1:8001", model="fido") as reader:
        print(reader.answer("who wrote Faust?", ["Faust is a play by Goethe.", "Schiller wrote The Robbers."]).text)

Everything that a program needs is importable from here, the asyncio client included. Nothing is retried: what to do about a
ReaderUnavailable is the caller's to say.
"""

import contextlib
import dataclasses
import queue
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import InferenceServerClient, InferResult, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from clients.answer import Answer, StreamAssembler, StreamedAnswer, StreamPiece, answer_from_result
from clients.async_reader_client import AsyncAnswerStream, AsyncReaderClient
from clients.endpoint import Endpoint, grpc_timeout_s
from clients.errors import ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused
from clients.ordered_window import OrderedWindow
from clients.request import (
    Passage,
    ReaderRequest,
    infer_inputs_from_tensors,
    infer_message_from_tensors,
    request_from,
    tensors_from_request,
)

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncReaderClient",
    "Passage",
    "ReaderClient",
    "ReaderError",
    "ReaderRequest",
    "ReaderTimeout",
    "ReaderUnavailable",
    "RequestRefused",
    "StreamPiece",
    "StreamedAnswer",
]


@dataclasses.dataclass(frozen=True)
class _Arrival:
    """The end of one request of `answer_many`, as gRPC's thread saw it."""

    index: int
    result: InferResult | None
    error: InferenceServerException | None
    deadline_s: float
    latency_s: float


class AnswerStream(Iterator[StreamPiece]):
    """An answer under way: an iterator over its pieces, and once it has ended, `answer`.

    Closing it or leaving its `with` block before the end cancels the request on the server; so does dropping it, which gRPC sees to.
    """

    def __init__(self, call: Any, endpoint: Endpoint, model: str, *, deadline_s: float, start_s: float) -> None:
        self._call = call
        self._endpoint = endpoint
        self._model = model
        self._deadline_s = deadline_s
        self._start_s = start_s
        self._assembler = StreamAssembler(model)
        self._answer: StreamedAnswer | None = None
        self._ended = False

    def __next__(self) -> StreamPiece:
        """The next piece.

        Raises:
            ReaderError: If the server refused or failed; no more pieces come after that.
        """
        try:
            while not self._ended:
                piece = self._next_response()
                if piece is not None:
                    return piece
        except BaseException:
            self.close()
            raise
        raise StopIteration

    @property
    def answer(self) -> StreamedAnswer:
        """The whole answer with its totals and times.

        Raises:
            RuntimeError: If the stream has not been read to its end.
        """
        if self._answer is None:
            raise RuntimeError("the answer is not whole yet: read the stream to its end first, or call read_to_end()")
        return self._answer

    def read_to_end(self) -> StreamedAnswer:
        """Reads what is left and gives the whole answer."""
        for _ in self:
            pass
        return self.answer

    def close(self) -> None:
        """Ends the stream; a request still under way is cancelled on the server. Harmless when done twice."""
        self._ended = True
        self._call.cancel()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _next_response(self) -> StreamPiece | None:
        try:
            response = next(self._call)
        except StopIteration:
            self._ended = True
            self._answer = self._assembler.finish()
            return None
        except grpc.RpcError as error:
            if not self._assembler.is_complete:
                raise self._endpoint.error(error, model=self._model, timeout_s=self._deadline_s) from error
            self._ended = True  # the connection broke behind the totals: nothing is missing
            self._answer = self._assembler.finish()
            return None
        if response.error_message:
            self._read_out()
            raise self._endpoint.error(InferenceServerException(response.error_message), model=self._model, timeout_s=self._deadline_s)
        return self._assembler.feed(InferResult(response.infer_response), time.perf_counter() - self._start_s)

    def _read_out(self) -> None:
        """Waits for the server's end of a stream: of one cancelled at its error Triton (2.51) keeps the whole request for good."""
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass


class ReaderClient:
    """Asks one reader; safe to share between threads. Its connection is made at the first question and reused.

    Args:
        url: "host:port" of Triton's gRPC endpoint.
        model: The unary reader, "fid" or "fido".
        timeout_s: How long a request may take that does not say so itself; math.inf for no limit.
        stream_model: The reader that `stream` asks; None: `model` + "_stream".
        ssl: Encrypt the connection.
        root_certificates: PEM file of whom to trust; None: gRPC's own default.
        private_key: PEM file of our key, where the server asks for a client certificate.
        certificate_chain: PEM file of our certificate.

    Raises:
        ValueError: If an argument cannot be right.
        FileNotFoundError: If a PEM file is not there.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "fido",
        timeout_s: float = 60.0,
        *,
        stream_model: str | None = None,
        ssl: bool = False,
        root_certificates: str | None = None,
        private_key: str | None = None,
        certificate_chain: str | None = None,
    ) -> None:
        self.endpoint = Endpoint(url, model, timeout_s, stream_model, ssl, root_certificates, private_key, certificate_chain)
        args, credentials = self.endpoint.channel_args(), self.endpoint.credentials()
        self._client = InferenceServerClient(url, creds=credentials, channel_args=args)
        # tritonclient allows one stream per client and leaves a thread behind for every stream that is cancelled, hence the bare call here;
        # gRPC lets both channels share one connection
        self._stream_channel = grpc.secure_channel(url, credentials, args) if credentials else grpc.insecure_channel(url, args)
        self._stream_stub = service_pb2_grpc.GRPCInferenceServiceStub(self._stream_channel)
        self._closed = False

    def is_ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the server answers and serves the unary model now."""
        try:
            return bool(self._client.is_model_ready(self.endpoint.model, client_timeout=timeout_s))
        except InferenceServerException:
            return False

    def answer(
        self,
        question: str,
        passages: Iterable[Passage],
        titles: Iterable[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Asks one question and waits for the answer.

        Args:
            question: The question, without any prompt words.
            passages: At least one: plain strings, or mappings with "text" and optionally "title".
            titles: One per passage, where the passages do not carry them.
            max_new_tokens: At most so many answer tokens, the end token included; None: the server's default.
            min_new_tokens: At least so many; None: the server's default.
            timeout_s: How long it may take; None: the client's.

        Raises:
            RequestRefused: If the request is at fault, found here or by the server.
            ReaderTimeout: If no answer came in time.
            ReaderUnavailable: If the server or the model is not there.
            ReaderError: If the server failed in another way.
        """
        self._check_open()
        start_s = time.perf_counter()
        endpoint, deadline_s = self.endpoint, self.endpoint.deadline_s(timeout_s)
        request = ReaderRequest(question, passages, titles, max_new_tokens, min_new_tokens)
        inputs = infer_inputs_from_tensors(tensors_from_request(request, model=endpoint.model))
        try:
            result = self._client.infer(endpoint.model, inputs, client_timeout=grpc_timeout_s(deadline_s))
        except InferenceServerException as error:
            raise endpoint.error(error, model=endpoint.model, timeout_s=deadline_s) from error
        return answer_from_result(result, model=endpoint.model, latency_s=time.perf_counter() - start_s)

    def answer_many(self, requests: Iterable[ReaderRequest | Mapping[str, Any]], concurrency: int = 8) -> Iterator[Answer | ReaderError]:
        """Asks many questions, `concurrency` at a time, and gives the results in the order of the requests.

        A request that fails yields its ReaderError in its place, not raised: the others go on. Requests are taken from the iterable as
        places come free, at most 16 * concurrency ahead of what has been handed out, so it may be a generator without end. If it raises
        itself, that error is raised here after the results of what it gave before. Closing the result early cancels what is in flight.

        Args:
            requests: ReaderRequests, or mappings of their fields.
            concurrency: How many requests are in flight at a time.

        Raises:
            ValueError: If `concurrency` is not a whole number from 1.
        """
        self._check_open()
        window: OrderedWindow[ReaderRequest | Mapping[str, Any], Answer | ReaderError] = OrderedWindow(requests, concurrency)
        return self._answer_window(window)

    def stream(
        self,
        question: str,
        passages: Iterable[Passage],
        titles: Iterable[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        timeout_s: float | None = None,
    ) -> AnswerStream:
        """Asks one question and gives the answer in pieces as they are generated; the arguments and errors are those of `answer`.

        But for one thing: Triton answers an error inside a stream in words alone, so what the server itself refuses there is a plain
        ReaderError
        with status None. The request is on its way when this returns. `timeout_s` is for the whole answer.
        """
        self._check_open()
        start_s = time.perf_counter()
        model, deadline_s = self.endpoint.streaming_model, self.endpoint.deadline_s(timeout_s)
        request = ReaderRequest(question, passages, titles, max_new_tokens, min_new_tokens)
        message = infer_message_from_tensors(model, tensors_from_request(request, model=model))
        # the iterator ends after one request, which tells Triton to end the stream after its answer Never with the header
        # triton_grpc_error, which would give errors their status: each one it ends may kill Triton 2.51 (segmentation fault)
        call = self._stream_stub.ModelStreamInfer(iter([message]), timeout=grpc_timeout_s(deadline_s))
        return AnswerStream(call, self.endpoint, model, deadline_s=deadline_s, start_s=start_s)

    def close(self) -> None:
        """Closes the connection; what is in flight is cancelled. Harmless when done twice."""
        self._closed = True
        self._client.close()
        self._stream_channel.close()

    def __enter__(self) -> "ReaderClient":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this ReaderClient is closed; make a new one")

    def _answer_window(self, window: OrderedWindow[Any, Answer | ReaderError]) -> Iterator[Answer | ReaderError]:
        arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        calls: dict[int, Any] = {}
        try:
            while True:
                for index, item in window.start():
                    try:
                        calls[index] = self._send(index, item, arrivals)
                    except ReaderError as error:
                        window.finish(index, error)
                yield from window.due()
                if not calls:
                    if window.is_exhausted:
                        return
                    continue
                arrival = arrivals.get()
                del calls[arrival.index]
                window.finish(arrival.index, self._result(arrival))
        finally:
            for call in calls.values():
                call.cancel()

    def _send(self, index: int, item: ReaderRequest | Mapping[str, Any], arrivals: "queue.SimpleQueue[_Arrival]") -> Any:
        """Starts one request; its arrival, good or bad, is put into the queue by gRPC's thread."""
        self._check_open()
        start_s = time.perf_counter()
        endpoint = self.endpoint
        request = request_from(item)
        try:
            deadline_s = endpoint.deadline_s(request.timeout_s)
        except ValueError as error:
            raise RequestRefused(str(error), model=endpoint.model) from error
        inputs = infer_inputs_from_tensors(tensors_from_request(request, model=endpoint.model))

        def arrived(result: InferResult | None, error: InferenceServerException | None) -> None:
            arrivals.put(_Arrival(index, result, error, deadline_s, time.perf_counter() - start_s))

        return self._client.async_infer(endpoint.model, inputs, arrived, client_timeout=grpc_timeout_s(deadline_s))

    def _result(self, arrival: _Arrival) -> Answer | ReaderError:
        model = self.endpoint.model
        if arrival.error is not None:
            return self.endpoint.error(arrival.error, model=model, timeout_s=arrival.deadline_s)
        try:
            return answer_from_result(arrival.result, model=model, latency_s=arrival.latency_s)
        except ReaderError as error:
            return error
