"""Keeps a server up: when it or one of its models dies or takes no more requests, it is ended and started again on the same ports.

Triton 2.51 leaves a Python model whose process has died as it is, says that it is ready, and fails every request to it; only another
start helps. Requests under way are told by their connection's end.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from .installation import ServerError
from .liveness import LivenessProbe
from .server import TritonServer

CHECK_PERIOD_S = 0.25
# What still runs beside a dead model may end within this; a request to the dead one never will.
DRAIN_AFTER_DEATH_S = 2.0
# A server that dies again within BACKOFF_RESET_S is started again after a pause, which doubles each time.
MIN_BACKOFF_S, MAX_BACKOFF_S, BACKOFF_RESET_S = 0.5, 30.0, 60.0


def keep_serving(new_server: Callable[[], TritonServer], stop: threading.Event, announce: Callable[[TritonServer], None]) -> None:
    """Serve until `stop` is set.

    Args:
        new_server: makes a server that is not yet started.
        stop: ends serving: requests in flight may finish.
        announce: called with each server once it is ready.

    Raises:
        ServerError: if the first start fails. A later one that fails is tried again.
    """
    backoff_s = 0.0
    served_before = False
    while not stop.is_set():
        started_s = time.monotonic()
        try:
            with new_server() as server:
                announce(server)
                served_before = True
                asked = [model for model in server.models if not model.endswith("_encoder")]
                with LivenessProbe(server.grpc_url, asked) as pulse:
                    while not stop.wait(CHECK_PERIOD_S):
                        if failure := server.failure() or pulse.failure():
                            break
                    else:
                        print("stopping", flush=True)
                        return
                server.stop(DRAIN_AFTER_DEATH_S)
        except ServerError as error:
            if not served_before:
                raise
            failure = str(error)
        calm = time.monotonic() - started_s > BACKOFF_RESET_S
        backoff_s = 0.0 if calm else min(MAX_BACKOFF_S, max(MIN_BACKOFF_S, 2 * backoff_s))
        print(f"{failure}; starting again" + (f" in {backoff_s:.1f} s" if backoff_s else ""), file=sys.stderr, flush=True)
        stop.wait(backoff_s)
