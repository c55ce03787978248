"""Leftovers of killed servers are removed; what a living server or another user has is not."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from serving.launcher import cleanup
from serving.launcher.cleanup import SHM, Workspace, remove_leftovers
from serving.launcher.processes import GuardedProcess, descendants
from tests.serving.launcher.stand_in import ends_within, is_running

ROOT = Path(__file__).parents[3]
# makes a workspace and a region, says where they are, and waits to be killed; the child holds the locks as tritonserver does
OWNER = """
import subprocess, sys, time
from serving.launcher.cleanup import SHM, Workspace
w = Workspace()
(SHM / (w.shm_prefix + "region")).touch()
child = subprocess.Popen(["sleep", "600"], pass_fds=w.lock_fds, stdout=subprocess.DEVNULL)
print(w.shm_prefix, w.scratch, child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    prefix, scratch, child = process.stdout.readline().split()
    yield process, SHM / f"{prefix}region", Path(scratch), int(child)
    process.kill()
    process.wait()
    try:
        os.kill(int(child), signal.SIGKILL)
    except ProcessLookupError:
        pass
    assert ends_within(int(child), 5)
    remove_leftovers()


def test_a_living_server_keeps_its_regions_and_its_folder(owner):
    _process, region, scratch, _child = owner
    remove_leftovers()
    assert region.exists() and scratch.exists()


def test_they_stay_while_a_process_of_a_killed_launcher_still_lives_and_go_after_it(owner):
    process, region, scratch, child = owner
    process.kill()
    process.wait()
    remove_leftovers()
    assert region.exists() and scratch.exists(), "tritonserver still drains"
    os.kill(child, signal.SIGKILL)
    assert ends_within(child, 5)
    remove_leftovers()
    assert not region.exists() and not scratch.exists()
    assert not list(SHM.glob(f"{region.name.removesuffix('region')}*")), "the lock goes too"


def test_a_process_id_that_is_not_ours_to_see_says_nothing(owner, monkeypatch):
    """In another container the owner's process id does not exist, or is another process."""
    _process, region, _scratch, _child = owner
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/proc/") and exists(path))
    remove_leftovers()
    assert exists(region)


def test_what_another_user_has_left_stays_and_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    theirs = [SHM / f"{cleanup.SHM_PREFIX}1-00000000-{end}" for end in ("lock", "region")]
    folder = tmp_path / f"{cleanup.SCRATCH_PREFIX}1-x"
    folder.mkdir()
    (folder / "lock").touch()
    for path in theirs:
        path.touch()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # so that they are another user's
    try:
        remove_leftovers()
        assert all(path.exists() for path in theirs) and folder.exists()
    finally:
        for path in theirs:
            path.unlink()


def test_a_leftover_that_cannot_be_removed_is_no_error(monkeypatch):
    """A sticky /dev/shm refuses to remove what another user has put there."""
    lock, region = (SHM / f"{cleanup.SHM_PREFIX}1-00000001-{end}" for end in ("lock", "region"))
    lock.touch()
    region.touch()
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    try:
        remove_leftovers()
    finally:
        unlink(lock)
        unlink(region)


def test_two_servers_of_one_process_have_names_of_their_own():
    one, two = Workspace(), Workspace()
    try:
        assert one.shm_prefix != two.shm_prefix
        region = SHM / f"{two.shm_prefix}region"
        region.touch()
        one.remove()
        assert region.exists() and not one.scratch.exists()
    finally:
        one.remove()
        two.remove()
    assert not region.exists()


def test_a_lock_that_a_cleaner_was_faster_to_take_is_not_used(tmp_path, monkeypatch):
    """Between its creation and its locking, another launcher may take a lock file for abandoned."""
    real, raced = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not raced:
            raced.append(fd)
            os.unlink(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    workspace = Workspace()
    try:
        assert raced and (SHM / f"{workspace.shm_prefix}lock").exists()
    finally:
        workspace.remove()


# A server's process ends with its launcher, whatever ends the launcher, and not with a thread of it.

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


@pytest.mark.parametrize(("bound", "said"), [(0, "unlimited"), (5 << 30, str(5 << 20))])
def test_a_server_takes_no_more_memory_than_its_bound(tmp_path, bound, said):
    result = tmp_path / "result"
    server = GuardedProcess(["sh", "-c", f"ulimit -d > {result}"], dict(os.environ), {}, 1, (), 5, most_memory_bytes=bound)
    server.popen.wait(10)
    server.end(1)
    assert result.read_text().strip() == said


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
