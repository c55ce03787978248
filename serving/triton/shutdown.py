"""How a model's process ends when it cannot end by itself, and when it must not go on.

Triton 2.51 waits without limit for the process of a model that it unloads. On a GPU, readers' processes were seen not to end after all
was answered and finalized (their main thread is in native code by then), and encoders' to crash. The server then waited its whole exit
timeout, and the next start waited for the server.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

# Both end before Triton's exit timeout of 30 s.
DRAIN_TIMEOUT_S = 22.0  # from the order to end until every question has its error
EXIT_TIMEOUT_S = 5.0  # after that
GPU_EXIT_TIMEOUT_S = 1.0  # the same on a GPU, where the process is known not to end
RESPONSES_S = 0.5  # for responses on their way, when the process ends itself
FATAL_EXIT_CODE = 70
STANDARD_ERROR = 2  # by number: sys.stderr of an embedded interpreter need not be a file


def arm_watchdog(seconds: float) -> None:
    """End the process after so many seconds, with code 1 and the stack of every thread. A later call sets a new time."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)


def exit_soon(*, on_gpu: bool) -> None:
    """Everything was answered: the process has little time left to end by itself."""
    arm_watchdog(GPU_EXIT_TIMEOUT_S if on_gpu else EXIT_TIMEOUT_S)


def end_process(reason: str) -> None:
    """End this process because it cannot serve any more; the launcher starts the server again.

    Returns at once, so that errors on their way reach their clients first.
    """
    print(f"FATAL: {reason}; ending this process", file=sys.stderr, flush=True)
    timer = threading.Timer(RESPONSES_S, os._exit, (FATAL_EXIT_CODE,))
    timer.daemon = True
    timer.start()
