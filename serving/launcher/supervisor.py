"""Keeps a server up: if it or one of its models dies or stops answering, it is ended and started again on the same ports.

Triton 2.51 does not restart a Python model whose process has died, says that it is ready, and fails every request to it. Only a restart
of the whole server helps. Clients notice it as a closed connection.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable

from .endpoints import PortError
from .installation import ServerError
from .liveness import LivenessProbe
from .repository import ENCODER
from .server import TritonServer

CHECK_PERIOD_S = 0.25
# Requests to the models that still live may finish within this time. A request to a dead model never does.
DRAIN_AFTER_DEATH_S = 2.0
# A server that dies again within BACKOFF_RESET_S is started again after a pause, which doubles each time.
MIN_BACKOFF_S, MAX_BACKOFF_S, BACKOFF_RESET_S = 0.5, 30.0, 60.0


@dataclasses.dataclass(frozen=True)
class Draining:
    """How a server is drained that is told to end; see TritonServer.drain.

    Attributes:
        timeout_s: how long the questions in flight may take.
        delay_s: between "not ready" and the first refusal.
        hurry: set it to end at once.
    """

    timeout_s: float = 30.0
    delay_s: float = 0.0
    hurry: threading.Event = dataclasses.field(default_factory=threading.Event)


def keep_serving(
    new_server: Callable[[], TritonServer],
    stop: threading.Event,
    announce: Callable[[TritonServer], None],
    draining: Draining | None = None,
    name: str = "",
) -> None:
    """Serve until `stop` is set.

    Args:
        new_server: makes a server that is not yet started.
        stop: ends serving: the server is drained first.
        announce: called with each server when it is ready.
        draining: how; None takes the defaults.
        name: of the server, before every message; "" if it is the only one.

    Raises:
        ServerError: if the first start fails; a later one is tried again.
        PortError: if a port is taken, at the first start or a later one.
    """
    draining = draining or Draining()
    backoff_s = 0.0
    served_before = False
    while not stop.is_set():
        started_s = time.monotonic()
        try:
            with new_server() as server:
                announce(server)
                served_before = True
                failure = _wait_for_failure(server, stop)
                if failure is None:
                    print(f"{name}stopping\n", end="", flush=True)  # in one piece: other servers of a fleet print too
                    if not server.drain(draining.timeout_s, draining.delay_s, draining.hurry):
                        print(
                            f"{name}not all questions in flight were answered within {draining.timeout_s:g} s", file=sys.stderr, flush=True
                        )
                        server.stop(DRAIN_AFTER_DEATH_S)
                    return
                server.stop(DRAIN_AFTER_DEATH_S)
        except PortError:
            raise
        except ServerError as error:
            if not served_before:
                raise
            failure = str(error)
        lived_long = time.monotonic() - started_s > BACKOFF_RESET_S
        backoff_s = 0.0 if lived_long else min(MAX_BACKOFF_S, max(MIN_BACKOFF_S, 2 * backoff_s))
        print(f"{name}{failure}; starting again" + (f" in {backoff_s:.1f} s" if backoff_s else ""), file=sys.stderr, flush=True)
        stop.wait(backoff_s)


def _wait_for_failure(server: TritonServer, stop: threading.Event) -> str | None:
    """Wait until the server fails, and say how; None if `stop` came first."""
    probed = [model for model in server.models if not model.endswith(ENCODER)]
    with LivenessProbe(server.grpc_url, probed) as probe:
        while not stop.wait(CHECK_PERIOD_S):
            if failure := server.failure() or probe.failure():
                return failure
    return None
