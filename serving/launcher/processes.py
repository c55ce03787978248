"""Starts a server's process so that it ends with this one, ends it, and finds its children.

In: a command. Out: a `GuardedProcess`. The kernel's parent-death signal is not used: it comes when the starting thread ends, not the
process, and it needs Python code between fork and exec. Instead a small shell process, the guard, waits for the end of a pipe whose other
end only this process holds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# The shell becomes the server, so that the server has the process id that Popen returns. $1 is how many seconds the server may drain,
# $2 the path that its shared memory regions start with, $3 its scratch folder: the guard removes both if the launcher was killed. $4 is how
# many KiB of memory of its own it may take, 0 for no bound.
# Standard input is the pipe; the guard keeps it as descriptor 3. The guard is in the server's process group, and that keeps the number of
# the group from being used again. SIGPIPE is ignored: the server goes on when nobody reads its log.
GUARD = """
exec 3<&0 </dev/null
trap '' PIPE
(
    read -r _ <&3
    kill -s TERM $$
    for _ in $(seq "$1"); do
        sleep 1
        read -r _ _ state _ </proc/$$/stat && [ "$state" != Z ] || break
    done
    case "$2" in /dev/shm/?*) rm -f -- "$2"* ;; esac
    case "$3" in /?*) rm -rf -- "$3" ;; esac
    kill -s KILL -- -$$
) >/dev/null 2>&1 &
exec 3<&-
[ "$4" = 0 ] || ulimit -d "$4" 2>/dev/null || :
shift 4
exec "$@"
"""
GUARD_NAME = "fido-guard"
END_POLL_S = 0.1


class GuardedProcess:
    """A running process with a group of its own.

    Args:
        command: the program and its arguments.
        environment: of the process and of the guard.
        preload: environment variables of the process alone; the guard goes without.
        output_fd: for standard output and standard error.
        inherited_fds: descriptors that the process and its children keep open.
        drain_timeout_s: how long the process may take to end if this process is killed.
        shm_prefix: path that the names of its shared memory regions start with, removed if this process is killed; "" for none.
        scratch: folder that is removed then; "" for none.
        most_memory_bytes: that the process, and each of its children, may take for itself (RLIMIT_DATA); 0 for no bound.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        preload: Mapping[str, str],
        output_fd: int,
        inherited_fds: Sequence[int],
        drain_timeout_s: float,
        shm_prefix: str = "",
        scratch: str = "",
        most_memory_bytes: int = 0,
    ):
        guard_fd, self._lifeline_fd = os.pipe()
        variables = ["env", *(f"{name}={value}" for name, value in preload.items())] if preload else []
        guard = [str(max(1, round(drain_timeout_s))), shm_prefix, scratch, str(most_memory_bytes // 1024)]
        try:
            # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which decides how the server ends.
            self.popen = subprocess.Popen(
                ["/bin/sh", "-c", GUARD, GUARD_NAME, *guard, *variables, *command],
                stdin=guard_fd,
                stdout=output_fd,
                stderr=output_fd,
                env=environment,
                pass_fds=inherited_fds,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline_fd)
            raise
        finally:
            os.close(guard_fd)

    def end(self, timeout_s: float, is_idle: Callable[[], bool] = lambda: False, idle_s: float = 0.0) -> None:
        """Ask the process to end, wait, then kill it, the guard and every child in its group.

        Args:
            timeout_s: how long to wait at most.
            is_idle: whether the process has nothing left to do; asked again and again.
            idle_s: it is waited for no longer than this once it is idle.
        """
        self.popen.send_signal(signal.SIGTERM)
        deadline_s, idle_since_s = time.monotonic() + timeout_s, None
        while (now_s := time.monotonic()) < deadline_s:
            try:
                self.popen.wait(min(END_POLL_S, deadline_s - now_s))
                break
            except subprocess.TimeoutExpired:
                idle_since_s = (idle_since_s or time.monotonic()) if is_idle() else None
            if idle_since_s is not None and time.monotonic() - idle_since_s >= idle_s:
                break
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.popen.wait()
        os.close(self._lifeline_fd)


def model_processes(server_pid: int, models: Sequence[str]) -> dict[str, int]:
    """Process ids of the Python processes of a server's models: MODEL -> id; a second process of a model is "MODEL 2"."""
    found: dict[str, int] = {}
    for pid in descendants(server_pid):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        if GUARD_NAME in arguments:
            continue
        for model in models:
            if any(f"/{model}/" in argument for argument in arguments):
                number = sum(name.split()[0] == model for name in found) + 1
                found[model if number == 1 else f"{model} {number}"] = pid
    return found


def descendants(pid: int) -> list[int]:
    """Process ids of the direct and indirect children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            direct = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *descendants(child)]
    return found
