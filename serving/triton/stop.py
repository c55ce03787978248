"""Requests to stop another request: how a client leaves without a cancelled stream, which may end Triton (final_flag.py).

A client that may want to leave gives its request an id of its own choice, at least MIN_ID_CHARACTERS long and drawn at random: whoever
knows the id can stop the request. To leave, it sends the same model a request with the id "stop:" + that id, and reads the first one to
its end. The stopped request ends between two decoder steps with the error "stopped by the client". The tensors of the stopping request are
not looked at; an empty question is refused by a server that does not know these requests. Its answer is empty.

A reader with several processes (`reader_instances`) has the stop arrive at any of them. One that arrives at the wrong one has no effect.
"""

from __future__ import annotations

import collections
import time

STOP_PREFIX = "stop:"
MIN_ID_CHARACTERS = 16  # shorter ids are counters and names, which others can guess and several requests can share
# A stop may overtake the request that it names.
REMEMBERED_S, MAX_REMEMBERED = 10.0, 4096


def stopped_id(request_id: str) -> str | None:
    """The id of the request to stop; None if this request is not one to stop another."""
    return request_id[len(STOP_PREFIX) :] if request_id.startswith(STOP_PREFIX) else None


class EarlyStops:
    """Stops that named no request in flight, kept for REMEMBERED_S in case it is still to come. Used by one thread."""

    def __init__(self) -> None:
        self._expiry_s: collections.OrderedDict[str, float] = collections.OrderedDict()

    def add(self, request_id: str) -> None:
        """Remember a stop."""
        self._drop_expired()
        if len(self._expiry_s) < MAX_REMEMBERED:
            self._expiry_s[request_id] = time.monotonic() + REMEMBERED_S

    def take(self, request_id: str) -> bool:
        """Whether a request that arrives now was stopped before; its stop is forgotten."""
        self._drop_expired()
        return self._expiry_s.pop(request_id, None) is not None

    def _drop_expired(self) -> None:
        now = time.monotonic()
        while self._expiry_s and next(iter(self._expiry_s.values())) <= now:
            self._expiry_s.popitem(last=False)
