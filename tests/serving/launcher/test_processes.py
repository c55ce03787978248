"""A server's process ends with its launcher, whatever ends the launcher, and not with a thread of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from serving.launcher.processes import GuardedProcess, descendants
from tests.serving.launcher.stand_in import ends_within, is_running

ROOT = Path(__file__).parents[3]
LAUNCHER = """
import os, sys, time
from serving.launcher.processes import GuardedProcess
server = GuardedProcess(["sleep", "600"], dict(os.environ), {}, 1, (), 5)
print(server.popen.pid, flush=True)
time.sleep(600)
"""


def start(*command: str, output_fd: int = 1, **preload: str) -> GuardedProcess:
    return GuardedProcess(command, dict(os.environ), preload, output_fd, (), 5)


def test_a_launcher_that_is_killed_takes_its_server_with_it():
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert is_running(pid)
    while not (children := descendants(pid)):  # the shell has not started it yet
        time.sleep(0.01)
    (guard,) = children
    launcher.kill()
    launcher.wait()
    assert ends_within(pid, 5)
    assert ends_within(guard, 3), "it must not wait for the whole drain timeout"


def test_a_server_outlives_the_thread_that_started_it():
    started: list[GuardedProcess] = []
    thread = threading.Thread(target=lambda: started.append(start("sleep", "600")))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert is_running(started[0].popen.pid)
    started[0].end(5)
    assert not is_running(started[0].popen.pid)


def test_what_does_not_end_in_time_is_killed_with_its_children(tmp_path):
    children = tmp_path / "children"
    server = start("sh", "-c", f"trap '' TERM; sleep 600 & echo $! > {children}; while :; do sleep 0.1; done")
    deadline = time.monotonic() + 5
    while not children.exists() or not children.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.end(0.2)
    assert not is_running(server.popen.pid) and ends_within(int(children.read_text()), 2)


def test_a_server_whose_log_nobody_reads_goes_on(tmp_path):
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    server = start("sh", "-c", f"echo a; echo b; echo on > {tmp_path / 'result'}", output_fd=write_fd)
    os.close(write_fd)
    server.popen.wait(5)
    assert (tmp_path / "result").read_text() == "on\n"
    server.end(0)


def test_the_preloaded_library_is_for_the_server_and_not_for_its_guard(tmp_path):
    result = tmp_path / "result"
    server = start("sh", "-c", f'echo "$GUARDED" > {result}; exec sleep 600', GUARDED="one two:three")
    deadline = time.monotonic() + 5
    while not result.exists() or not result.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (guard,) = (int(pid) for pid in Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children").read_text().split())
    assert result.read_text() == "one two:three\n"
    assert b"GUARDED=" not in Path(f"/proc/{guard}/environ").read_bytes()
    server.end(5)
