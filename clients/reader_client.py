"""ReaderClient: a question and its passages -> an Answer, through Triton's gRPC endpoint.

    with ReaderClient("127.0.0.1:8001", model="fido") as reader:
        print(reader.answer("who wrote Faust?", ["Faust is a play by Goethe.", "Schiller wrote The Robbers."]).text)

All public names, the asyncio client's too, can be imported from here. Nothing is retried: the caller decides what to do about a
ReaderUnavailable.
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
    """The result of one request of `answer_many`, passed from gRPC's thread."""

    index: int
    result: InferResult | None
    error: InferenceServerException | None
    deadline_s: float
    latency_s: float


class AnswerStream(Iterator[StreamPiece]):
    """A streamed answer: an iterator over its pieces, and after the end, `answer`.

    Closing it, leaving its `with` block, or dropping the last reference before the end cancels the request on the server.
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
            ReaderError: If the server refused or failed; the stream ends there.
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
        """The complete answer with its totals and times.

        Raises:
            RuntimeError: If the stream has not been read to its end.
        """
        if self._answer is None:
            raise RuntimeError("the answer is incomplete: read the stream to its end first, or call read_to_end()")
        return self._answer

    def read_to_end(self) -> StreamedAnswer:
        """Read the rest and return the complete answer."""
        for _ in self:
            pass
        return self.answer

    def close(self) -> None:
        """End the stream and cancel an unfinished request on the server. Calling it twice is harmless."""
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
            self._ended = True  # the connection broke after the totals: nothing is missing
            self._answer = self._assembler.finish()
            return None
        if response.error_message:
            self._read_out()
            raise self._endpoint.error(InferenceServerException(response.error_message), model=self._model, timeout_s=self._deadline_s)
        return self._assembler.feed(InferResult(response.infer_response), time.perf_counter() - self._start_s)

    def _read_out(self) -> None:
        """Wait for the server to end the stream: Triton 2.51 leaks the request of a stream that is cancelled after its error."""
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass


class ReaderClient:
    """A client of one reader; safe to share between threads. It connects at the first question and reuses the connection.

    Args:
        url: "host:port" of Triton's gRPC endpoint.
        model: The unary reader, "fid" or "fido".
        timeout_s: Time-out in seconds of a request that sets none; math.inf for no limit.
        stream_model: The model that `stream` uses; None: `model` + "_stream".
        ssl: Encrypt the connection.
        root_certificates: PEM file of trusted certificates; None: gRPC's default.
        private_key: PEM file of the client's key, for servers that require a client certificate.
        certificate_chain: PEM file of the client's certificate.

    Raises:
        ValueError: If an argument is invalid.
        FileNotFoundError: If a PEM file does not exist.
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
        # tritonclient allows one stream per client and leaks a thread for each cancelled stream, so streams use the stub directly. gRPC
        # shares one connection between both channels.
        self._stream_channel = grpc.secure_channel(url, credentials, args) if credentials else grpc.insecure_channel(url, args)
        self._stream_stub = service_pb2_grpc.GRPCInferenceServiceStub(self._stream_channel)
        self._closed = False

    def is_ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the server responds and the unary model is ready."""
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
        """Ask one question and wait for the answer.

        Args:
            question: The question, without any prompt words.
            passages: At least one: plain strings, or mappings with "text" and optionally "title".
            titles: One per passage, where the passages do not carry them.
            max_new_tokens: Maximum number of answer tokens, with the end token; None: the server's default.
            min_new_tokens: Minimum number of answer tokens; None: the server's default.
            timeout_s: Time-out of this request in seconds; None: the client's.

        Raises:
            RequestRefused: If the request is invalid, by the client's or the server's checks.
            ReaderTimeout: If no answer arrived in time.
            ReaderUnavailable: If the server or the model is not available.
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
        """Ask one question and stream the answer while it is generated; arguments and errors are those of `answer`, with one exception.

        Triton sends errors inside a stream without a status, so a request that the server refuses raises a plain ReaderError with status
        None. The request has been sent when this returns. `timeout_s` applies to the complete answer.
        """
        self._check_open()
        start_s = time.perf_counter()
        model, deadline_s = self.endpoint.streaming_model, self.endpoint.deadline_s(timeout_s)
        request = ReaderRequest(question, passages, titles, max_new_tokens, min_new_tokens)
        message = infer_message_from_tensors(model, tensors_from_request(request, model=model))
        # The iterator ends after one request, so Triton ends the stream after its answer. Do not send the header triton_grpc_error, which
        # would give errors their status: in Triton 2.51 an error under it may crash the server (segmentation fault).
        call = self._stream_stub.ModelStreamInfer(iter([message]), timeout=grpc_timeout_s(deadline_s))
        return AnswerStream(call, self.endpoint, model, deadline_s=deadline_s, start_s=start_s)

    def close(self) -> None:
        """Close the connection and cancel the requests in flight. Calling it twice is harmless."""
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
        """Start one request; gRPC's thread puts its result or error into the queue."""
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
