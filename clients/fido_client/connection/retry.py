"""When a failed request is sent again: exponential backoff with jitter. It sends nothing itself.

A reader is a pure function of its request, so sending one twice is safe. Retried are UNAVAILABLE (the server is down, starts or is full, or
the connection broke) and what Triton says while it shuts down. A streamed answer is not retried: a part of it may have been shown.
"""

from __future__ import annotations

import dataclasses
import random

from ..errors import ReaderError, ReaderUnavailable

_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0
# What Triton answers while it shuts down, by status: its models are unloaded before it stops to listen
_SHUTTING_DOWN = {"NOT_FOUND": "has no available versions", "INTERNAL": "Server not ready"}


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
        if failures > self.retries or not _may_pass(error):
            return None
        longest_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures - 1, 30))
        pause_s = random.uniform(longest_s / 2, longest_s)
        return pause_s if pause_s < remaining_s else None


def _may_pass(error: ReaderError) -> bool:
    """Whether the same request may succeed later, or on another server."""
    unavailable = isinstance(error, ReaderUnavailable) and error.status == "UNAVAILABLE"
    words = _SHUTTING_DOWN.get(error.status or "")
    return unavailable or (words is not None and words in (error.message or ""))
