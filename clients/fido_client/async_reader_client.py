"""AsyncReaderClient: ReaderClient for asyncio.

    async with AsyncReaderClient("127.0.0.1:8001", model="fido") as reader:
        print((await reader.answer("who wrote Faust?", ["Faust is a play by Goethe."])).text)

Cancelling the task that waits for an answer cancels the request on the server. The arguments and errors are described in reader_client.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import InferResult
from tritonclient.grpc import aio as triton_aio
from tritonclient.utils import InferenceServerException

from .answer import Answer, StreamAssembler, StreamedAnswer, StreamPiece, answer_from_result
from .connection.async_stream_call import AsyncStreamCall, StreamTasks
from .connection.balancer import Balancer
from .connection.diagnosis import Diagnosis
from .connection.endpoint import Endpoint, grpc_timeout_s, url_of
from .connection.retry import RetryPolicy
from .connection.stop import deadline_exceeded
from .errors import ReaderError, RequestRefused, error_from_exception, status_and_message
from .ordered_window import OrderedWindow
from .request import Passage, ReaderRequest, infer_inputs_from_tensors, request_from, tensors_from_request

AsyncFailure = Callable[[Exception, str, float], Awaitable[ReaderError]]
"""An exception of gRPC or tritonclient, the model and the time-out in seconds -> the error that the caller sees."""


class AsyncAnswerStream(AsyncIterator[StreamPiece]):
    """A streamed answer: an asynchronous iterator over its pieces, and after the end, `answer`.

    Closing it, leaving its `async with` block, or dropping it before the end stops the answer on the server. As in AnswerStream, the
    stream is then read to its end in the background.
    """

    def __init__(
        self,
        again: Callable[[], tuple[AsyncStreamCall, Callable[[Exception | None], None]]],
        failure: AsyncFailure,
        model: str,
        *,
        deadline_s: float,
        start_s: float,
        retry: RetryPolicy,
    ) -> None:
        self._again, self._retry, self._failures = again, retry, 0
        self._call, self._report = again()
        self._failure = failure
        self._model = model
        self._deadline_s = deadline_s
        self._start_s = start_s
        self._assembler = StreamAssembler(model)
        self._answer: StreamedAnswer | None = None
        self._ended = False
        self._loop = asyncio.get_running_loop()

    def __del__(self) -> None:
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._call.leave)

    async def __anext__(self) -> StreamPiece:
        """The next piece.

        Raises:
            ReaderError: If the server refused or failed; the stream ends there.
        """
        try:
            while not self._ended:
                try:
                    piece = await self._next_response()
                except ReaderError as error:
                    await self._ask_again(error)
                    continue
                if piece is not None:
                    return piece
        except BaseException:
            await self.aclose()
            raise
        raise StopAsyncIteration

    @property
    def answer(self) -> StreamedAnswer:
        """The complete answer with its totals and times.

        Raises:
            RuntimeError: If the stream has not been read to its end.
        """
        if self._answer is None:
            raise RuntimeError("the answer is incomplete: read the stream to its end first, or call read_to_end()")
        return self._answer

    async def read_to_end(self) -> StreamedAnswer:
        """Read the rest and return the complete answer."""
        async for _ in self:
            pass
        return self.answer

    async def aclose(self) -> None:
        """End the stream and stop an unfinished answer on the server. Returns at once; calling it twice is harmless."""
        self._ended = True
        self._call.leave()

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()

    async def _ask_again(self, error: ReaderError) -> None:
        """As AnswerStream's: another attempt, or the error."""
        self._failures += 1
        remaining_s = self._start_s + self._deadline_s - time.perf_counter()
        pause_s = self._retry.pause_s(error, failures=self._failures, remaining_s=remaining_s)
        if pause_s is None:
            raise error
        self._call.leave()
        await asyncio.sleep(pause_s)
        self._call, self._report = self._again()
        self._assembler.restart()

    async def _next_response(self) -> StreamPiece | None:
        try:
            response = await self._call.next_response()
        except TimeoutError as timeout:
            raise await self._failure(deadline_exceeded(), self._model, self._deadline_s) from timeout
        except grpc.RpcError as rpc_error:
            self._report(rpc_error)
            raise await self._failure(rpc_error, self._model, self._deadline_s) from rpc_error
        if response is None:
            self._answer, self._ended = self._assembler.finish(), True
            return None
        result, error = response
        self._report(error)
        if error is not None:
            raise await self._failure(error, self._model, self._deadline_s)
        piece = self._assembler.feed(result, time.perf_counter() - self._start_s)
        if self._assembler.is_complete:  # the stream's end follows later
            self._answer, self._ended = self._assembler.finish(), True
        return piece


class _Connection:
    """What one event loop has open: a client for each address."""

    def __init__(self, clients: Sequence[triton_aio.InferenceServerClient]) -> None:
        self.clients = tuple(clients)
        self.balancer = Balancer(len(self.clients))
        self.streams = StreamTasks()

    async def aclose(self) -> None:
        await self.streams.aclose()
        for client in self.clients:
            await client.close()


class AsyncReaderClient:
    """A client of one reader; ReaderClient describes the arguments.

    It may be used in several event loops, one after another or at the same time in several threads: each loop gets a connection of its own.
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
    ) -> None:
        self.endpoint = Endpoint(url_of(url), model, timeout_s, stream_model, ssl, root_certificates, private_key, certificate_chain)
        self._credentials = self.endpoint.credentials()
        self._retry = RetryPolicy(retries)
        self._diagnosis = Diagnosis(self.endpoint)
        self._lock = threading.Lock()
        self._opened: dict[asyncio.AbstractEventLoop, _Connection] = {}
        self._closed = False

    async def is_ready(self, timeout_s: float = 5.0) -> bool:
        """Whether the server responds and the unary model is ready."""
        for client in self._connection().clients:
            with contextlib.suppress(InferenceServerException):
                if await client.is_model_ready(self.endpoint.model, client_timeout=timeout_s):
                    return True
        return False

    async def answer(
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
        """Ask one question and wait for the answer; arguments and errors are those of ReaderClient.answer."""
        start_s = time.perf_counter()
        connection, endpoint, deadline_s = self._connection(), self.endpoint, self.endpoint.deadline_s(timeout_s)
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
        inputs = infer_inputs_from_tensors(tensors_from_request(request, model=endpoint.model))
        failures = 0
        while True:
            left_s = start_s + deadline_s - time.perf_counter()
            timeout_left_s = grpc_timeout_s(max(left_s, 0.001) if failures else deadline_s)
            index = connection.balancer.pick()
            try:
                result: InferResult = await connection.clients[index].infer(endpoint.model, inputs, client_timeout=timeout_left_s)
                connection.balancer.report(index, None)
                self._retry.budget.answered()
                return answer_from_result(result, model=endpoint.model, latency_s=time.perf_counter() - start_s)
            except InferenceServerException as exception:
                connection.balancer.report(index, exception)
                failures += 1
                error = error_from_exception(exception, model=endpoint.model, url=endpoint.url, timeout_s=deadline_s)
                remaining_s = start_s + deadline_s - time.perf_counter()
                pause_s = self._retry.pause_s(error, failures=failures, remaining_s=remaining_s)
                if pause_s is None:
                    raise await self._failure(exception, endpoint.model, deadline_s) from exception
            await asyncio.sleep(pause_s)

    async def answer_many(
        self, requests: Iterable[ReaderRequest | Mapping[str, Any]], concurrency: int = 8
    ) -> AsyncIterator[Answer | ReaderError]:
        """Ask many questions, `concurrency` at a time, and yield the results in the order of the requests.

        As in ReaderClient.answer_many, a request that fails yields its ReaderError in its place. Closing the generator early (`aclose`) or
        cancelling the task that reads it cancels what is in flight.
        """
        window: OrderedWindow[ReaderRequest | Mapping[str, Any], Answer | ReaderError] = OrderedWindow(requests, concurrency)
        tasks: dict[asyncio.Task[Answer | ReaderError], int] = {}
        try:
            while not window.is_exhausted:
                for index, item in window.start():
                    tasks[asyncio.create_task(self._answer_or_error(item))] = index
                for result in window.due():
                    yield result
                if tasks:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        window.finish(tasks.pop(task), task.result())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
    ) -> AsyncAnswerStream:
        """Ask one question and stream the answer while it is generated; not a coroutine, but it needs a running event loop.

        The arguments and errors are those of ReaderClient.stream; `timeout_s` applies to the complete answer.
        """
        start_s = time.perf_counter()
        connection, model, deadline_s = self._connection(), self.endpoint.streaming_model, self.endpoint.deadline_s(timeout_s)
        dropping: dict[str, Any] = {"keep_encoder_tokens": keep_encoder_tokens, "keep_passages": keep_passages, "drop_after": drop_after}
        request = ReaderRequest(question, passages, titles, max_new_tokens, min_new_tokens, **dropping)
        inputs = infer_inputs_from_tensors(tensors_from_request(request, model=model))

        def open_call() -> tuple[AsyncStreamCall, Callable[[Exception | None], None]]:
            index = connection.balancer.pick()
            call = AsyncStreamCall(connection.clients[index], connection.streams, model, inputs, deadline_s, start_s)
            return call, lambda error: connection.balancer.report(index, error)

        return AsyncAnswerStream(open_call, self._failure, model, deadline_s=deadline_s, start_s=start_s, retry=self._retry)

    async def aclose(self) -> None:
        """Stop the streams, wait for their end, and close the connections of all event loops, which cancels other requests.

        Calling it twice is harmless.
        """
        self._closed = True
        with self._lock:
            opened, self._opened = self._opened, {}
        for loop, connection in opened.items():
            if loop is asyncio.get_running_loop():
                await connection.aclose()
            elif loop.is_running():  # in another thread
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(connection.aclose(), loop))

    async def __aenter__(self) -> AsyncReaderClient:
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()

    def _connection(self) -> _Connection:
        """The running event loop's connection, opened at its first use: gRPC ties a connection to its loop."""
        if self._closed:
            raise RuntimeError("this AsyncReaderClient is closed; make a new one")
        running = asyncio.get_running_loop()
        with self._lock:
            self._opened = {loop: connection for loop, connection in self._opened.items() if not loop.is_closed()}
            if running not in self._opened:
                self._opened[running] = _Connection(
                    [
                        triton_aio.InferenceServerClient(each.url, creds=self._credentials, channel_args=each.channel_args())
                        for each in self.endpoint.each()
                    ]
                )
            return self._opened[running]

    async def _failure(self, exception: Exception, model: str, timeout_s: float) -> ReaderError:
        hint = await asyncio.to_thread(self._diagnosis.hint, *status_and_message(exception))
        return error_from_exception(exception, model=model, url=self.endpoint.url, timeout_s=timeout_s, hint=hint)

    async def _answer_or_error(self, item: ReaderRequest | Mapping[str, Any]) -> Answer | ReaderError:
        try:
            request = request_from(item)
            try:
                self.endpoint.deadline_s(request.timeout_s)
            except ValueError as error:
                raise RequestRefused(str(error), model=self.endpoint.model) from error
            return await self.answer(
                request.question,
                request.passages,
                request.titles,
                max_new_tokens=request.max_new_tokens,
                min_new_tokens=request.min_new_tokens,
                timeout_s=request.timeout_s,
                num_beams=request.num_beams,
                num_answers=request.num_answers,
                length_penalty=request.length_penalty,
                allowed_answers=request.allowed_answers,
                keep_encoder_tokens=request.keep_encoder_tokens,
                keep_passages=request.keep_passages,
                drop_after=request.drop_after,
            )
        except ReaderError as error:
            return error
