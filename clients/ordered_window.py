"""Which request starts next and whose result is due: the order behind `answer_many`, without threads or an event loop."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")

_READ_AHEAD = 16  # times the concurrency: one slow request must not starve the server, nor let finished results pile up without end


class OrderedWindow(Generic[Request, Result]):
    """Takes requests from an iterable as places come free, and hands results out in the order of their requests.

    An iterable that raises ends the intake; its error is raised by `due` after the results of all that came before it.
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
        """Started and not yet finished."""
        return self._started - self._handed_out - len(self._finished)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left to start, to finish or to hand out."""
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
        """Takes the result of a started request."""
        self._finished[index] = result

    def due(self) -> Iterator[Result]:
        """The results whose turn it is, as far as they are there."""
        while self._handed_out in self._finished:
            result = self._finished.pop(self._handed_out)
            self._handed_out += 1
            yield result
        if self._source_error is not None and self._handed_out == self._started:
            error, self._source_error = self._source_error, None
            raise error
