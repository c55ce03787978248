"""Sends the final flag of each stream alone, later than the stream's last response.

Comes in: a caller whose stream has had its last response. Goes out: the flag that tells Triton that the stream is over. The flag is empty,
so a client has its whole answer before and gains nothing from waiting for it.

Triton 2.51 and 2.71 end with a segmentation fault if a stream's final flag arrives after gRPC has learned that the client cancelled and
before Triton's completion-queue thread has handled the notification. Most clients that cancel do so while the answer grows or as soon as
it is complete. The delay gives Triton the time to handle that notification first. What remains is a cancel that comes just before the flag.

A waiting flag keeps Triton's request alive. It keeps no slot, no place in flight and nothing of the answer.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Protocol

DELAY_S = 0.3  # after the last response
CANCELLED_DELAY_S = 0.5  # more, if the client has cancelled by then


class StreamEnd(Protocol):
    """What a flag needs of its caller."""

    def poll_cancelled(self) -> bool:
        """Ask Triton whether the client has cancelled."""

    def send_final_flag(self) -> None:
        """Send the flag and nothing else. Called once."""


class FinalFlags:
    """Sends flags on a thread of its own until closed.

    Args:
        on_error: called with the error of a flag that could not be sent. Other flags are still sent.
    """

    def __init__(self, on_error: Callable[[Exception], None]):
        self._on_error = on_error
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, bool, StreamEnd]] = []  # heap: due time, order, is the second delay, caller
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="final-flags", daemon=True)
        self._thread.start()

    def send_later(self, caller: StreamEnd) -> None:
        """Send the flag of a stream that has had its last response. Returns at once."""
        self._push(DELAY_S, caller, is_second=False)

    def close(self) -> None:
        """Send the waiting flags now, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _push(self, delay_s: float, caller: StreamEnd, *, is_second: bool) -> None:
        with self._changed:
            heapq.heappush(self._waiting, (time.monotonic() + delay_s, next(self._order), is_second, caller))
            self._changed.notify()

    def _run(self) -> None:
        while (due := self._wait_for_due()) is not None:
            is_second, caller = due
            try:
                if not is_second and not self._closing and self._is_cancelled(caller):
                    self._push(CANCELLED_DELAY_S, caller, is_second=True)
                else:
                    caller.send_final_flag()
            except Exception as error:
                self._on_error(error)
            del due, caller  # the thread waits next, and must not keep the request alive meanwhile

    def _is_cancelled(self, caller: StreamEnd) -> bool:
        """Whether the client has cancelled; no, where Triton cannot say: the flag must be sent all the same."""
        try:
            return caller.poll_cancelled()
        except Exception as error:
            self._on_error(error)
            return False

    def _wait_for_due(self) -> tuple[bool, StreamEnd] | None:
        """The next flag that is due; None when closed and none is left."""
        with self._changed:
            while not self._closing:
                left_s = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if left_s is not None and left_s <= 0:
                    break
                self._changed.wait(left_s)
            if not self._waiting:
                return None
            _, _, is_second, caller = heapq.heappop(self._waiting)
            return is_second, caller
