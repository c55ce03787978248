"""The order of `answer_many`: which request starts next and which result is due. Uses neither threads nor an event loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")

_READ_AHEAD = 16  # times the concurrency: a slow request neither starves the server nor lets finished results grow without bound


class OrderedWindow(Generic[Request, Result]):
    """Starts requests from an iterable up to a concurrency, and returns results in the order of the requests.

    If the iterable raises, no further request starts; `due` raises the error after the results of all earlier requests.
    """

    def __init__(self, requests: Iterable[Request], concurrency: int) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency: wanted a whole number from 1, got {concurrency!r}")
        self._source: Iterator[Request] | None = iter(requests)
        self._source_error: Exception | None = None
        self._concurrency = concurrency
        self._read_ahead = _READ_AHEAD * concurrency
        self._finished: dict[int, Result] = {}
        self._started = 0
        self._handed_out = 0

    @property
    def in_flight(self) -> int:
        """Number of requests that are started and not finished."""
        return self._started - self._handed_out - len(self._finished)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left to start, to finish or to return."""
        return self._source is None and self._source_error is None and self._started == self._handed_out

    def start(self) -> Iterator[tuple[int, Request]]:
        """The requests to start now, each with its index."""
        while self._source is not None and self.in_flight < self._concurrency and self._started < self._handed_out + self._read_ahead:
            try:
                request = next(self._source)
            except StopIteration:
                self._source = None
                return
            except Exception as error:
                self._source, self._source_error = None, error
                return
            self._started += 1
            yield self._started - 1, request

    def finish(self, index: int, result: Result) -> None:
        """Store the result of a started request."""
        self._finished[index] = result

    def due(self) -> Iterator[Result]:
        """The finished results that are next in order."""
        while self._handed_out in self._finished:
            result = self._finished.pop(self._handed_out)
            self._handed_out += 1
            yield result
        if self._source_error is not None and self._handed_out == self._started:
            error, self._source_error = self._source_error, None
            raise error
