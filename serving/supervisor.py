"""Keeps a server up: when it or one of its models dies, it is ended and started again on the same ports.

Triton 2.51 leaves a Python model whose process has died as it is, says that it is ready, and fails every request to it; only another
start helps. Requests under way are told by their connection's end.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from .server import TritonServer
from .tritonserver import ServerError

CHECK_PERIOD_S = 0.25
# What still runs beside a dead model may end within this; a request to the dead one never will.
DRAIN_AFTER_DEATH_S = 2.0
# A server that dies this often within so short a time will go on dying: say so and end.
MOST_DEATHS, WITHIN_S = 5, 60.0


def keep_serving(new_server: Callable[[], TritonServer], stop: threading.Event, announce: Callable[[TritonServer], None]) -> None:
    """Serve until `stop` is set.

    Args:
        new_server: makes a server that is not yet started.
        stop: ends serving: requests in flight may finish.
        announce: called with each server once it is ready.

    Raises:
        ServerError: if the first start fails, or servers keep dying.
    """
    deaths: list[float] = []
    while not stop.is_set():
        with new_server() as server:
            announce(server)
            while not stop.wait(CHECK_PERIOD_S):
                if failure := server.failure():
                    break
            else:
                print("stopping", flush=True)
                return
            print(f"{failure}; starting again (see {server.log})", file=sys.stderr, flush=True)
            server.stop(DRAIN_AFTER_DEATH_S)
        deaths = [moment for moment in deaths if moment > time.monotonic() - WITHIN_S] + [time.monotonic()]
        if len(deaths) >= MOST_DEATHS:
            raise ServerError(f"the server died {len(deaths)} times within {WITHIN_S:.0f} s, last because {failure}")
