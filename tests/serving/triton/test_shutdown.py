"""A process that hangs is ended and says where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_is_ended_and_says_where():
    done = run(
        "import threading\nfrom serving.shutdown import arm_watchdog\ndef stuck(): threading.Event().wait()\nend_within(0.2)\nstuck()"
    )
    assert done.returncode == 1 and "stuck" in done.stderr and "Timeout" in done.stderr


def test_a_process_that_ends_in_time_is_let_alone():
    done = run("from serving.shutdown import arm_watchdog\nend_within(30)")
    assert done.returncode == 0 and done.stderr == ""
