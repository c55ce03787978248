"""The server under test: `python -m serving` as an operator starts it, watched from outside through /proc, its metrics and /dev/shm."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from serving.launcher.installation import PROJECT
from serving.launcher.server import LOOPBACK, free_ports, models_of

from .questions import READERS

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0
SHM = Path("/dev/shm")
GAUGES = ("reader_active_slots", "reader_waiting_questions", "reader_in_flight_questions", "reader_kv_cache_bytes")
PR_SET_PDEATHSIG = 1
READY = "ready; Ctrl-C stops"  # the last line that it prints once it serves: until then a death is a failed start, which it does not mend
# sets up a /dev/shm of its own, then becomes the command that follows
PRIVATE_SHM = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'


class StartError(RuntimeError):
    """The server ended, or was not ready in time; the message is what it printed."""


class Served:
    """`python -m serving` on a repository.

    Args:
        repository: the model repository.
        scratch: folder for its log and its output.
        readers: to serve, streaming models included.
        shm_bytes: size of a /dev/shm of its own; None leaves it the machine's.
    """

    def __init__(
        self, repository: Path, scratch: Path, readers: Sequence[str] = READERS, shm_bytes: int | None = None, stream: bool = True
    ):
        self.models = models_of(readers, stream=stream)
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.log, self._printed = scratch / f"{self.grpc_port}.log", scratch / f"{self.grpc_port}.out"
        ports = {"--http-port": self.http_port, "--grpc-port": self.grpc_port, "--metrics-port": self.metrics_port}
        command = [sys.executable, "-m", "serving", "--readers", *readers, "--repository", str(repository), "--log", str(self.log)]
        command += ["--stream"] * stream + [str(part) for pair in ports.items() for part in pair]
        self._command = command if shm_bytes is None else [*private_shm_prefix(), str(shm_bytes), *command]
        self._launcher: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    @property
    def grpc_url(self) -> str:
        """host:port of the gRPC endpoint."""
        return f"{LOOPBACK}:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """Process id of `python -m serving`."""
        assert self._launcher is not None
        return self._launcher.pid

    @property
    def shm(self) -> Path:
        """The /dev/shm that the server sees."""
        return Path(f"/proc/{self.pid}/root/dev/shm")

    def start(self) -> Served:
        """Start it and wait until it is ready.

        Raises:
            StartError: if it ends, or takes too long.
        """
        with self._printed.open("wb") as out:
            self._launcher = subprocess.Popen(
                self._command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY not in self.printed():
            if self._launcher.poll() is not None:
                raise StartError(self.printed())
            if time.monotonic() > deadline:
                raise StartError(f"not ready after {START_TIMEOUT_S:.0f} s; {self.printed()}")
            time.sleep(0.05)
        self.processes()
        return self

    def printed(self) -> str:
        """What `python -m serving` has printed."""
        return self._printed.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        """Whether `python -m serving` is alive."""
        return self._launcher is not None and self._launcher.poll() is None

    def processes(self) -> dict[str, int]:
        """Process id of every model, of Triton itself under "tritonserver", and of `python -m serving` under "serving"."""
        found = {"serving": self.pid} if self.is_running() else {}
        for pid in descendants(self.pid):
            self._seen.add(pid)
            words = arguments(pid)
            if words and words[0].endswith("tritonserver"):
                found["tritonserver"] = pid
            for model in self.models:
                if any(f"/{model}/" in word for word in words):
                    found[model] = pid
        return found

    def samples(self) -> Samples:
        """All metrics now."""
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.metrics_port}/metrics", timeout=5) as response:
            return parse(response.read().decode())

    def regions(self) -> list[str]:
        """Shared memory regions that belong to this `python -m serving`."""
        try:
            return sorted(path.name for path in self.shm.glob(f"fido-{self.pid}-*"))
        except OSError:
            return []

    def regions_of_machine(self) -> list[str]:
        """The same on the machine's /dev/shm, for when the server is gone."""
        return sorted(path.name for path in SHM.glob(f"fido-{self.pid}-*"))

    def shm_bytes(self) -> int:
        """Bytes that those regions take."""
        return sum((self.shm / name).stat().st_blocks * 512 for name in self.regions())

    def memory(self) -> dict[str, int]:
        """Bytes that each process holds for itself."""
        return {name: resident_bytes(pid) for name, pid in self.processes().items()}

    def signal(self, number: int) -> None:
        """Send `python -m serving` a signal."""
        self.processes()
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Its exit code, or None if it does not end in time."""
        assert self._launcher is not None
        try:
            return self._launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> list[str]:
        """End it, as Ctrl-C would; gives what it has left behind, and removes that."""
        if self._launcher is None:
            return []
        if self.is_running():
            self.signal(signal.SIGTERM)
        left = [] if self.wait() is not None else [f"`python -m serving` was still there {STOP_TIMEOUT_S:.0f} s after SIGTERM"]
        return left + self.sweep()

    def sweep(self, patience_s: float = 5.0) -> list[str]:
        """What is left once `python -m serving` should be gone: processes and shared memory. They are ended and removed."""
        deadline = time.monotonic() + patience_s
        while (alive := [pid for pid in self._seen if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [f"process {pid} ({' '.join(arguments(pid))[:80]})" for pid in alive]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        if self.is_running():
            assert self._launcher is not None
            self._launcher.kill()
            self._launcher.wait()
        for region in sorted(SHM.glob(f"fido-{self.pid}-*")):  # a /dev/shm of its own has gone with it
            left.append(f"/dev/shm/{region.name}")
            region.unlink(missing_ok=True)
        return left


def private_shm_prefix() -> list[str]:
    """What to put before a size and a command, so that it runs with a small /dev/shm of its own; empty where that is not allowed."""
    for namespaces in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        prefix = ["unshare", *namespaces, "sh", "-c", PRIVATE_SHM]
        try:
            if subprocess.run([*prefix, "1048576", "true"], capture_output=True, timeout=10).returncode == 0:
                return prefix
        except (OSError, subprocess.TimeoutExpired):
            continue
    return []


def _end_with_parent() -> None:
    """In the child: be told to stop if the suite itself is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# Prometheus text -> samples. Pure.

# name -> model -> value, summed over the other labels; a metric without a model is under ""
Samples = dict[str, dict[str, float]]

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_MODEL = re.compile(r'(?:^|,)model="([^"]*)"')


def parse(text: str) -> Samples:
    """Every sample of an exposition; comments and what is no sample are passed over."""
    samples: Samples = {}
    for line in text.splitlines():
        if line.startswith("#") or not (match := _LINE.match(line)):
            continue
        model = _MODEL.search(match["labels"] or "")
        by_model = samples.setdefault(match["name"], {})
        name = model[1] if model else ""
        by_model[name] = by_model.get(name, 0.0) + float(match["value"])
    return samples


# Processes as /proc shows them: who descends from whom, who is alive, how much memory each holds. Pure but for reading /proc.

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def state_and_parent(stat: str) -> tuple[str, int]:
    """State letter and parent's process id from the text of /proc/PID/stat; the command in it may hold blanks and brackets."""
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[1])


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return state_and_parent(Path(f"/proc/{pid}/stat").read_text())[0] not in "ZX"
    except (OSError, IndexError):
        return False


def descendants(pid: int) -> list[int]:
    """Live children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = state_and_parent((entry / "stat").read_text())
            except (OSError, IndexError):
                continue  # it ended while we looked
            if state not in "ZX":
                children.setdefault(parent, []).append(int(entry.name))
    found, open_ = [], [pid]
    while open_:
        direct = children.get(open_.pop(), [])
        found += direct
        open_ += direct
    return found


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    """Memory that the process alone holds: resident, less what it shares (libraries, /dev/shm); 0 if it is gone."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * PAGE_BYTES
