"""ReaderClient: a question and its passages -> an Answer, through Triton's gRPC endpoint.

    with ReaderClient("127.0.0.1:8001", model="fido") as reader:
        print(reader.answer("who wrote Faust?", ["Faust is a play by Goethe.", "Schiller wrote The Robbers."]).text)

Nothing is retried unless `retries` says so.
"""

from __future__ import annotations

import dataclasses
import heapq
import queue
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Union

import grpc
import numpy as np
from tritonclient.grpc import InferResult
from tritonclient.utils import InferenceServerException

from .answer import Answer, StreamedAnswer, StreamPiece, answer_from_result
from .answer_stream import AnswerStream
from .async_reader_client import AsyncAnswerStream, AsyncReaderClient
from .connection.balancer import BalancedTransport
from .connection.diagnosis import Diagnosis
from .connection.endpoint import Endpoint, url_of
from .connection.grpc_transport import GrpcTransport, Stream, Transport
from .connection.http_transport import HttpTransport
from .connection.retry import RetryPolicy
from .connection.served_models import TIMEOUT_S, ServedModel
from .errors import ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused, error_from_exception, status_and_message
from .ordered_window import OrderedWindow
from .request import Passage, ReaderRequest, request_from, tensors_from_request

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


Question = Union[ReaderRequest, Mapping[str, Any]]


@dataclasses.dataclass
class _Pending:
    """One unfinished request of `answer_many`; times are of time.perf_counter()."""

    tensors: Mapping[str, np.ndarray]
    deadline_s: float
    start_s: float
    failures: int = 0
    call: Any = None

    @property
    def remaining_s(self) -> float:
        return self.start_s + self.deadline_s - time.perf_counter()


@dataclasses.dataclass(frozen=True)
class _Arrival:
    """The result of one attempt, passed from gRPC's thread."""

    index: int
    result: InferResult | None
    error: InferenceServerException | None
    latency_s: float


class ReaderClient:
    """A client of one reader; safe to share between threads. It connects at the first question and reuses the connection.

    Args:
        url: "host:port" of Triton's gRPC endpoint, or of its HTTP endpoint. Several servers of one reader, which then take turns: a list
            of addresses, addresses by commas, "ipv4:A:PORT,B:PORT", or "dns:///NAME:PORT" for all addresses of a name. Over HTTP a name's
            addresses are those that it has now.
        model: The reader's name on the server, such as "fido".
        timeout_s: Time-out in seconds of a request that sets none; math.inf for no limit.
        stream_model: The model that `stream` uses; None: `model` + "_stream".
        retries: How often a request is sent again while the server is not available, with a growing pause and within its time-out. A reader
            is a pure function of the request, so this is safe. A stream goes on after what has come.
        ssl: Encrypt the connection.
        root_certificates: PEM file of trusted certificates; None: gRPC's default.
        private_key: PEM file of the client's key, for servers that require a client certificate.
        certificate_chain: PEM file of the client's certificate.
        transport: "grpc" or "http". Over HTTP a stream that is left, even by a client that is killed, cannot harm the server; a unary
            request takes longer, as numbers travel as text.

    Raises:
        ValueError: If an argument is invalid.
        FileNotFoundError: If a PEM file does not exist.
    """

    def __init__(
        self,
        url: str | Sequence[str] = "127.0.0.1:8001",
        model: str = "fido",
        timeout_s: float = 60.0,
        *,
        stream_model: str | None = None,
        retries: int = 0,
        ssl: bool = False,
        root_certificates: str | None = None,
        private_key: str | None = None,
        certificate_chain: str | None = None,
        transport: str = "grpc",
    ) -> None:
        self.endpoint = Endpoint(url_of(url), model, timeout_s, stream_model, ssl, root_certificates, private_key, certificate_chain)
        self._retry = RetryPolicy(retries)
        if transport not in ("grpc", "http"):
            raise ValueError(f'transport: wanted "grpc" or "http", got {transport!r}')
        # over HTTP, errors of the connection are plain, and a probe of gRPC would mislead
        self._diagnosis = Diagnosis(self.endpoint) if transport == "grpc" else None
        transports: list[Transport] = (
            [GrpcTransport(each) for each in self.endpoint.each()]
            if transport == "grpc"
            else [HttpTransport(each) for each in self.endpoint.each_resolved()]
        )
        self._transport: Transport = transports[0] if len(transports) == 1 else BalancedTransport(transports)
        self._closed = False

    def is_ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the server responds and the unary model is ready."""
        return self._transport.is_ready(timeout_s)

    def served_model(self) -> ServedModel:
        """The reader's configuration on the server, with its limits, such as the number of passages.

        Raises:
            ReaderUnavailable: If the server does not answer, or does not have the model.
            ReaderError: If it failed in another way.
        """
        self._check_open()
        try:
            return self._transport.served_model()
        except (grpc.RpcError, InferenceServerException) as error:
            raise self._failure(error, self.endpoint.model, TIMEOUT_S) from error

    def answer(
        self,
        question: str,
        passages: Iterable[Passage],
        titles: Iterable[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        timeout_s: float | None = None,
        num_beams: int | None = None,
        num_answers: int | None = None,
        length_penalty: float | None = None,
        allowed_answers: Iterable[str] | None = None,
        keep_encoder_tokens: float | None = None,
        keep_passages: int | None = None,
        drop_after: int | None = None,
    ) -> Answer:
        """Ask one question and wait for the answer.

        Args:
            question: The question, without any prompt words.
            passages: At least one: plain strings, or mappings with "text" and optionally "title".
            titles: One per passage, where the passages do not carry them.
            max_new_tokens: Maximum number of answer tokens, with the end token; None: the server's default.
            min_new_tokens: Minimum number of answer tokens; None: the server's default.
            timeout_s: Time-out of this request in seconds; None: the client's.
            num_beams: Beams of a beam search, at least 1; None: a greedy answer. A stream has no beams.
            num_answers: How many answers to send, the best first, at most num_beams, or as many as are allowed; None: one.
            length_penalty: Answers are ordered by log_prob / tokens ** length_penalty; None: the server's default, 1.
            allowed_answers: The answer is the most probable of these, and `answer_log_probs` says how probable among them. With num_beams
                it is what a beam search finds among them, which is faster for long lists.
            keep_encoder_tokens: Share of the encoder tokens that are kept once `drop_after` tokens are generated: those with most
                cross-attention so far. Long answers are faster then. None: all.
            keep_passages: Passages that are kept then, chosen likewise; None: all.
            drop_after: None: the server's default, 1. Not together with beams or allowed answers.

        Raises:
            RequestRefused: If the request is invalid, by the client's or the server's checks.
            ReaderTimeout: If no answer arrived in time.
            ReaderUnavailable: If the server or the model is not available.
            ReaderError: If the server failed in another way.
        """
        self._check_open()
        start_s = time.perf_counter()
        endpoint, deadline_s = self.endpoint, self.endpoint.deadline_s(timeout_s)
        request = ReaderRequest(
            question,
            passages,
            titles,
            max_new_tokens,
            min_new_tokens,
            num_beams=num_beams,
            num_answers=num_answers,
            length_penalty=length_penalty,
            allowed_answers=allowed_answers,
            keep_encoder_tokens=keep_encoder_tokens,
            keep_passages=keep_passages,
            drop_after=drop_after,
        )
        pending = _Pending(tensors_from_request(request, model=endpoint.model), deadline_s, start_s)
        while True:
            timeout_left_s = max(pending.remaining_s, 0.001) if pending.failures else deadline_s
            try:
                result = self._transport.infer(pending.tensors, timeout_left_s)
                self._retry.budget.answered()
                return answer_from_result(result, model=endpoint.model, latency_s=time.perf_counter() - start_s)
            except InferenceServerException as error:
                pause_s = self._pause_s(pending, error)
                if pause_s is None:
                    raise self._failure(error, endpoint.model, deadline_s) from error
            time.sleep(pause_s)

    def answer_many(self, requests: Iterable[Question], concurrency: int = 8) -> Iterator[Answer | ReaderError]:
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
        return self._answer_window(OrderedWindow(requests, concurrency))

    def stream(
        self,
        question: str,
        passages: Iterable[Passage],
        titles: Iterable[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        timeout_s: float | None = None,
        keep_encoder_tokens: float | None = None,
        keep_passages: int | None = None,
        drop_after: int | None = None,
    ) -> AnswerStream:
        """Ask one question and stream the answer while it is generated; arguments and errors are those of `answer`, with one exception.

        Triton sends errors inside a stream without a status, so a request that the server refuses raises a plain ReaderError with status
        None. The request has been sent when this returns. `timeout_s` applies to the complete answer.
        """
        self._check_open()
        start_s = time.perf_counter()
        model, deadline_s = self.endpoint.streaming_model, self.endpoint.deadline_s(timeout_s)
        dropping: dict[str, Any] = {"keep_encoder_tokens": keep_encoder_tokens, "keep_passages": keep_passages, "drop_after": drop_after}
        request = ReaderRequest(question, passages, titles, max_new_tokens, min_new_tokens, **dropping)
        tensors = tensors_from_request(request, model=model)

        def open_again() -> Stream:
            self._check_open()
            return self._transport.open_stream(tensors, deadline_s, start_s)

        return AnswerStream(open_again(), self._failure, model, deadline_s=deadline_s, start_s=start_s, retry=self._retry, again=open_again)

    def close(self) -> None:
        """Cancel the requests in flight, stop the streams, and close the connection. Calling it twice is harmless."""
        self._closed = True
        self._transport.close()

    def __enter__(self) -> ReaderClient:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this ReaderClient is closed; make a new one")

    def _failure(self, exception: Exception, model: str, timeout_s: float) -> ReaderError:
        hint = self._diagnosis.hint(*status_and_message(exception)) if self._diagnosis else None
        return error_from_exception(exception, model=model, url=self.endpoint.url, timeout_s=timeout_s, hint=hint)

    def _pause_s(self, pending: _Pending, exception: InferenceServerException) -> float | None:
        """Count the failure; the pause before the next attempt, or None if there is none."""
        pending.failures += 1
        error = error_from_exception(exception, model=self.endpoint.model, url=self.endpoint.url, timeout_s=pending.deadline_s)
        return self._retry.pause_s(error, failures=pending.failures, remaining_s=pending.remaining_s)

    def _answer_window(self, window: OrderedWindow[Question, Answer | ReaderError]) -> Iterator[Answer | ReaderError]:
        arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        pending: dict[int, _Pending] = {}
        paused: list[tuple[float, int]] = []  # a heap of when to send which request again
        try:
            while True:
                for index, item in window.start():
                    try:
                        pending[index] = self._prepared(item)
                    except ReaderError as error:
                        window.finish(index, error)
                    else:
                        self._send(index, pending[index], arrivals)
                yield from window.due()
                if not pending:
                    if window.is_exhausted:
                        return
                    continue
                while paused and paused[0][0] <= time.perf_counter():
                    index = heapq.heappop(paused)[1]
                    self._send(index, pending[index], arrivals)
                try:
                    arrival = arrivals.get(timeout=max(0.0, paused[0][0] - time.perf_counter()) if paused else None)
                except queue.Empty:
                    continue
                request = pending[arrival.index]
                pause_s = None if arrival.error is None else self._pause_s(request, arrival.error)
                if pause_s is not None:
                    heapq.heappush(paused, (time.perf_counter() + pause_s, arrival.index))
                    continue
                del pending[arrival.index]
                window.finish(arrival.index, self._result(arrival, request.deadline_s))
        finally:
            for request in pending.values():
                if request.call is not None:
                    request.call.cancel()

    def _prepared(self, item: Question) -> _Pending:
        """The request, checked and encoded."""
        self._check_open()
        start_s = time.perf_counter()
        request = request_from(item)
        try:
            deadline_s = self.endpoint.deadline_s(request.timeout_s)
        except ValueError as error:
            raise RequestRefused(str(error), model=self.endpoint.model) from error
        return _Pending(tensors_from_request(request, model=self.endpoint.model), deadline_s, start_s)

    def _send(self, index: int, request: _Pending, arrivals: queue.SimpleQueue[_Arrival]) -> None:
        """Start one attempt; gRPC's thread puts its result or error into the queue."""
        self._check_open()

        def arrived(result: InferResult | None, error: InferenceServerException | None) -> None:
            arrivals.put(_Arrival(index, result, error, time.perf_counter() - request.start_s))

        timeout_s = max(request.remaining_s, 0.001) if request.failures else request.deadline_s
        request.call = self._transport.submit(request.tensors, timeout_s, arrived)

    def _result(self, arrival: _Arrival, deadline_s: float) -> Answer | ReaderError:
        model = self.endpoint.model
        if arrival.error is not None:
            return self._failure(arrival.error, model, deadline_s)
        self._retry.budget.answered()
        try:
            return answer_from_result(arrival.result, model=model, latency_s=arrival.latency_s)
        except ReaderError as error:
            return error
