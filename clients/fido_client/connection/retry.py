"""When a failed request is sent again: exponential backoff with jitter. It sends nothing itself.

A reader is a pure function of its request, so sending a request twice is safe. Only UNAVAILABLE is retried: the server is down, starts, is
full, or the connection broke. A streamed answer is not retried: a part of it may have been shown.
"""

from __future__ import annotations

import dataclasses
import random

from ..errors import ReaderError, ReaderUnavailable

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent again after a failure.

    Attributes:
        retries: Maximum number of further attempts; 0: none.
    """

    retries: int = 0

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
        return pause_s if pause_s < remaining_s else None
