"""AnswerStream: the responses of one streaming request -> the parts of an answer, and the complete answer. Opens no connection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType

import grpc
from tritonclient.grpc import InferResult
from tritonclient.utils import InferenceServerException

from .answer import StreamAssembler, StreamedAnswer, StreamPiece
from .connection.grpc_transport import Stream
from .connection.retry import RetryPolicy
from .connection.stop import deadline_exceeded
from .errors import ReaderError

Failure = Callable[[Exception, str, float], ReaderError]
"""An exception of gRPC or tritonclient, the model and the time-out in seconds -> the error that the caller sees."""


class AnswerStream(Iterator[StreamPiece]):
    """A streamed answer: an iterator over its pieces, and after the end, `answer`.

    Closing it, leaving its `with` block, or dropping the last reference before the end stops the answer on the server. Over HTTP the client
    hangs up. Over gRPC it reads the stream to its end in the background: cancelling it may end Triton (connection/stop.py).
    """

    def __init__(
        self,
        call: Stream,
        failure: Failure,
        model: str,
        *,
        deadline_s: float,
        start_s: float,
        retry: RetryPolicy | None = None,
        again: Callable[[], Stream] | None = None,
    ) -> None:
        self._call = call
        self._retry, self._again, self._failures = retry or RetryPolicy(), again, 0
        self._failure = failure
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
                try:
                    piece = self._next_response()
                except ReaderError as error:
                    self._ask_again(error)
                    continue
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
        """End the stream and stop an unfinished answer on the server. Returns at once; calling it twice is harmless."""
        self._ended = True
        self._call.leave()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _ask_again(self, error: ReaderError) -> None:
        """Send the question once more after a pause, or raise the error. Of its answer, what has been given is skipped."""
        self._failures += 1
        remaining_s = self._start_s + self._deadline_s - time.perf_counter()
        pause_s = self._retry.pause_s(error, failures=self._failures, remaining_s=remaining_s)
        if pause_s is None or self._again is None:
            raise error
        self._call.leave()
        time.sleep(pause_s)
        self._call = self._again()
        self._assembler.restart()

    def _next_response(self) -> StreamPiece | None:
        try:
            response = self._call.next_response()
        except TimeoutError as error:
            raise self._failure(deadline_exceeded(), self._model, self._deadline_s) from error
        except (grpc.RpcError, InferenceServerException) as error:
            raise self._failure(error, self._model, self._deadline_s) from error
        if response is None:
            self._answer, self._ended = self._assembler.finish(), True
            return None
        if response.error_message:
            raise self._failure(InferenceServerException(response.error_message), self._model, self._deadline_s)
        piece = self._assembler.feed(InferResult(response.infer_response), time.perf_counter() - self._start_s)
        if self._assembler.is_complete:  # the stream's end follows later
            self._answer, self._ended = self._assembler.finish(), True
        return piece
