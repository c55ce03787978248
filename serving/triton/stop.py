"""Requests to stop another request: how a client leaves without a cancelled stream, which may end Triton (final_flag.py).

A client that may want to leave gives its request an id of its own choice, at least MIN_ID_CHARACTERS long and drawn at random: whoever
knows the id can stop the request. To leave, it sends the same model a request with the id "stop:" + that id, and reads the first one to
its end. The stopped request ends between two decoder steps with the error "stopped by the client". The tensors of the stopping request are
not looked at; an empty question is refused by a server that does not know these requests. Its answer is empty.

A reader with several processes (`reader_instances`) has the stop arrive at any of them; StopRelay passes it on to the others.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOP_PREFIX = "stop:"
MIN_ID_CHARACTERS = 16  # shorter ids are counters and names, which others can guess and several requests can share
# A stop may overtake the request that it names.
REMEMBERED_S, MAX_REMEMBERED = 10.0, 4096


def id_of(request: Any) -> str:
    """A request's id, which HTTP generate puts among its parameters; empty if there is none, or it is no text.

    Args:
        request: Triton's. What else is wrong with its parameters is found when they are read.
    """
    try:
        if (request_id := request.request_id()) or '"id"' not in (request.parameters() or ""):
            return str(request_id)
        found = json.loads(request.parameters()).get("id")
    except ValueError:  # a name or a value that is not UTF-8, which HTTP generate passes on
        return ""
    return found if isinstance(found, str) else ""


def stopped_id(request_id: str) -> str | None:
    """The id of the request to stop; None if this request is not one to stop another."""
    return request_id[len(STOP_PREFIX) :] if request_id.startswith(STOP_PREFIX) else None


class EarlyStops:
    """Stops that named no request in flight, kept for REMEMBERED_S in case it is still to come. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expiry_s: collections.OrderedDict[str, float] = collections.OrderedDict()

    def add(self, request_id: str) -> None:
        """Remember a stop."""
        with self._lock:
            self._drop_expired()
            if len(self._expiry_s) < MAX_REMEMBERED:
                self._expiry_s[request_id] = time.monotonic() + REMEMBERED_S

    def take(self, request_id: str) -> bool:
        """Whether a request that arrives now was stopped before; its stop is forgotten."""
        with self._lock:
            self._drop_expired()
            return self._expiry_s.pop(request_id, None) is not None

    def _drop_expired(self) -> None:
        now = time.monotonic()
        while self._expiry_s and next(iter(self._expiry_s.values())) <= now:
            self._expiry_s.popitem(last=False)


class StopRelay:
    """Passes stops on among the processes of one model: each listens on a socket that the others find by its name.

    The sockets are datagram sockets of Linux's abstract namespace: they need no folder, and the kernel removes them with their process.

    Args:
        model: its name in Triton.
        on_stop: called with the id of a request that another process was asked to stop, on a thread of the relay.
    """

    def __init__(self, model: str, on_stop: Callable[[str], object]):
        self._prefix = f"fido-stop/{os.getppid()}/{model}/"  # the parent is Triton: servers beside it have other models of this name
        self._own = f"{self._prefix}{os.getpid()}"
        self._on_stop = on_stop
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{self._own}")
        threading.Thread(target=self._listen, name="stops", daemon=True).start()

    def forward(self, request_id: str) -> None:
        """Tell all other processes of the model. One whose queue is full is left out: its request runs to its end."""
        for name in self._others():
            with contextlib.suppress(OSError):
                self._socket.sendto(request_id.encode(), socket.MSG_DONTWAIT, f"\0{name}")

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._socket.close()

    def _others(self) -> Iterator[str]:
        """The sockets of the other processes; /proc/net/unix writes an abstract name's leading zero byte as @."""
        for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines():
            name = line.rpartition(" ")[2].removeprefix("@")
            if name.startswith(self._prefix) and name != self._own:
                yield name

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while received := self._socket.recv(4096):
                self._on_stop(received.decode("utf-8", errors="replace"))
