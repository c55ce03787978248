"""A process that hangs is ended with its stacks; one that must not go on ends itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_is_ended_and_shows_where():
    done = run(
        "import threading\nfrom serving.triton.shutdown import arm_watchdog\n"
        "def stuck(): threading.Event().wait()\narm_watchdog(0.2)\nstuck()"
    )
    assert done.returncode == 1 and "stuck" in done.stderr and "Timeout" in done.stderr


def test_a_process_that_ends_in_time_is_left_alone():
    done = run("from serving.triton.shutdown import arm_watchdog\narm_watchdog(30)")
    assert done.returncode == 0 and done.stderr == ""


def test_a_process_that_must_not_go_on_answers_first_and_ends_with_its_reason():
    done = run(
        "import threading\nfrom serving.triton.shutdown import end_process\nend_process('illegal address')\n"
        "print('answered', flush=True)\nthreading.Event().wait()"
    )
    assert done.returncode == 70 and done.stdout == "answered\n" and "FATAL: illegal address" in done.stderr
