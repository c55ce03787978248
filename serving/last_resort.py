"""A model's process that does not end by itself is ended, and says where every thread of it was.

Triton 2.51 waits without limit for the process of a model that it unloads. On a GPU the readers' processes were seen not to end, after all
was answered and finalized; the server then waited its whole exit timeout, and the next start had to wait for it.
"""

from __future__ import annotations

import faulthandler

END_WITHIN_S = 15.0  # of being told to: questions under way are told within one encoder call and one step
STANDARD_ERROR = 2  # by number: an embedded interpreter's sys.stderr need not be a file


def end_within(seconds: float = END_WITHIN_S) -> None:
    """From now on the process has so many seconds; then the stacks of its threads go to standard error and it exits with code 1."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)
