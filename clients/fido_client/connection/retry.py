"""When a failed request is sent again: exponential backoff with jitter. It sends nothing itself.

A reader is a pure function of its request, so sending a request twice is safe. Only UNAVAILABLE is retried: the server is down, starts, is
full, shuts down, or the connection broke. A streamed answer that broke off goes on with the next attempt's text after what has been given.

The retries of one client have a budget, so that they do not multiply the load of servers that have trouble. Beyond it a retry is not given
up: it waits for its turn, if its deadline allows.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time

from ..errors import ReaderError, ReaderUnavailable

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
# A client with up to a hundred requests in flight, with the pauses above, stays within the budget.
_BURST, _RETRIES_PER_S, _RETRIES_PER_ANSWER = 100.0, 50.0, 0.2


class RetryBudget:
    """A bucket of retries that refills with time and with answers; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left, self._at_s = _BURST, time.monotonic()

    def reserve_s(self, longest_s: float) -> float | None:
        """Take one retry: seconds until its turn; None, and nothing is taken, if that is longer than `longest_s`."""
        with self._lock:
            now_s = time.monotonic()
            self._left = min(_BURST, self._left + (now_s - self._at_s) * _RETRIES_PER_S)
            self._at_s = now_s
            wait_s = max(0.0, 1.0 - self._left) / _RETRIES_PER_S
            if wait_s > longest_s:
                return None
            self._left -= 1.0
            return wait_s

    def answered(self) -> None:
        """An answer came: some more retries are allowed."""
        with self._lock:
            self._left = min(_BURST, self._left + _RETRIES_PER_ANSWER)


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent again after a failure.

    Attributes:
        retries: Maximum number of further attempts; 0: none.
        budget: Of all requests of one client.
    """

    retries: int = 0
    budget: RetryBudget = dataclasses.field(default_factory=RetryBudget, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ValueError(f"retries: wanted a whole number from 0, got {self.retries!r}")

    def pause_s(self, error: ReaderError, *, failures: int, remaining_s: float) -> float | None:
        """Seconds to wait before the next attempt; None if the error stands.

        The pause is random between half and all of 0.1 s, 0.2 s, 0.4 s and so on up to 5 s, so that clients that failed together do not
        come back together.

        Args:
            error: The last attempt's.
            failures: Number of failed attempts, 1 after the first.
            remaining_s: Seconds until the request's deadline.
        """
        if failures > self.retries or not isinstance(error, ReaderUnavailable) or error.status != "UNAVAILABLE":
            return None
        longest_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures - 1, 30))
        pause_s = random.uniform(longest_s / 2, longest_s)
        if pause_s >= remaining_s:
            return None
        turn_s = self.budget.reserve_s(remaining_s)
        return None if turn_s is None else max(pause_s, turn_s)
