"""A model's process that does not end by itself is ended, and says where every thread of it was.

Triton 2.51 waits without limit for the process of a model that it unloads. On a GPU the readers' processes were seen not to end, after all
was answered and finalized (their main thread is in native code by then), and the encoders' to crash; the server then waited its whole exit
timeout, and the next start had to wait for it.
"""

from __future__ import annotations

import faulthandler

# Both end before Triton's exit timeout of 30 s does.
DRAIN_TIMEOUT_S = 22.0  # from being told to end until every question has been told so
EXIT_TIMEOUT_S = 5.0  # after that
GPU_EXIT_TIMEOUT_S = 1.0  # the same where it is known not to end
STANDARD_ERROR = 2  # by number: an embedded interpreter's sys.stderr need not be a file


def arm_watchdog(seconds: float) -> None:
    """The process has so many seconds from now, whatever it was given before; then it says where its threads are and exits with code 1."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)


def exit_soon(*, on_gpu: bool) -> None:
    """All was told: the process has little time left."""
    arm_watchdog(GPU_EXIT_TIMEOUT_S if on_gpu else EXIT_TIMEOUT_S)
