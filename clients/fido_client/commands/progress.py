"""A line on standard error that counts up to a total; silent where standard error is not a terminal, to keep logs readable."""

from __future__ import annotations

import sys
import time

_REDRAW_S = 0.2


class Progress:
    """Counts what is done, and what it took so far."""

    def __init__(self, total: int, label: str) -> None:
        self._total = total
        self._label = label
        self._done = 0
        self._start_s = time.monotonic()
        self._drawn_s = 0.0
        self._is_shown = sys.stderr.isatty()

    def update(self) -> None:
        """Count one more."""
        self._done += 1
        now_s = time.monotonic()
        if self._is_shown and (now_s - self._drawn_s >= _REDRAW_S or self._done == self._total):
            self._drawn_s = now_s
            print(f"\r{self._label}: {self._done} of {self._total}, {now_s - self._start_s:.0f} s ", end="", file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print a line above the count."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the count from the screen."""
        if self._is_shown and self._drawn_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
