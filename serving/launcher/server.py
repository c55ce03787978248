"""Starts Triton on some models of the repository, waits until it is ready, and ends it so that nothing is left behind.

`TritonServer` is what `make serve`, the demo, the evaluation, the benchmarks and the tests all use.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from serving.contract.manifest import MANIFEST_FILE, Manifest, ManifestError

from .installation import PROJECT, ServerError, environment, find_installation, prepared_backends, require_numpy_1

LOOPBACK = "127.0.0.1"
SHM = Path("/dev/shm")
SHM_PREFIX = "fido-"
SHM_BYTES = 8 << 20  # that every model has from the start: enough for a crowd of questions, so that it seldom grows, which it does for good
SCRATCH_PREFIX = "fido-triton-"
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # now: between fork and exec it could not be loaded safely
START_ATTEMPTS = 3
LOG_EXCERPT_LINES = 20  # of the log, where a start fails
CUDA_POOL_BYTES = 1 << 30  # a question of 40 x 256 tokens has 16 MB of hidden states at base size, and many are under way at once


def models_of(readers: Sequence[str], *, stream: bool) -> list[str]:
    """Names of the models that serve these readers."""
    return [name for r in readers for name in (f"{r}_encoder", r, *([f"{r}_stream"] if stream else []))]


def tls_arguments(certificate: Path | None, key: Path | None, root: Path | None) -> list[str]:
    """Arguments for tritonserver that encrypt gRPC; its HTTP endpoint has no TLS of its own and belongs behind a proxy."""
    if certificate is None or key is None:
        return []
    arguments = ["--grpc-use-ssl=true", f"--grpc-server-cert={certificate}", f"--grpc-server-key={key}"]
    return arguments + (["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={root}"] if root else [])


def pool_arguments(repository: Path) -> list[str]:
    """Memory pools for the models of a repository: hidden states pass between GPU models through Triton's own pool."""

    def on_gpu(directory: Path) -> bool:
        try:
            return Manifest.load(directory).on_gpu
        except ManifestError:
            return False  # the model itself says what is wrong when it loads

    found = any(on_gpu(path.parent) for path in repository.glob(f"*/*/{MANIFEST_FILE}"))
    return [f"--cuda-memory-pool-byte-size=0:{CUDA_POOL_BYTES}"] if found else []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind((LOOPBACK, 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def faults_in(lines: list[str]) -> list[str]:
    """The first faults of a log, each once: the cause comes first, and Triton at its end can repeat one of its own for pages."""
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith("E") or "UNAVAILABLE" in line or "error" in line.lower():
            found.setdefault(line.partition("] ")[2] or line, line)
    return list(found.values())[:LOG_EXCERPT_LINES]


class TritonServer:
    """A running tritonserver, as a context manager.

    Args:
        models: folders of the repository to load; nothing else is.
        repository: the model repository.
        ports: HTTP, gRPC and metrics; None takes free ones.
        address: to bind to; loopback unless said otherwise.
        log: file for the server's output; None keeps it in the scratch folder, from which a failed start quotes.
        start_timeout_s: how long loading may take.
        drain_timeout_s: how long requests in flight may take to end once it is told to stop.
        extra: more arguments for tritonserver.
    """

    def __init__(
        self,
        models: Sequence[str],
        repository: Path = PROJECT / "model_repository",
        ports: tuple[int, int, int] | None = None,
        address: str = LOOPBACK,
        log: Path | None = None,
        start_timeout_s: float = 120.0,
        drain_timeout_s: float = 30.0,
        extra: Sequence[str] = (),
    ):
        self.models, self.repository, self.address = tuple(models), Path(repository), address
        self.http_port, self.grpc_port, self.metrics_port = ports or free_ports(3)
        self._start_timeout_s, self._drain_timeout_s, self._extra = start_timeout_s, drain_timeout_s, tuple(extra)
        self._scratch = tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")
        self.log = log or Path(self._scratch.name, "tritonserver.log")
        # names the Python backend's shared memory, so that ours can be told from others' and removed
        self.shm_prefix = f"{SHM_PREFIX}{os.getpid()}-{self.grpc_port}-"
        self.process: subprocess.Popen[bytes] | None = None
        self._processes: set[str] = set()  # names of those that ran once all was ready
        self._log_start = 0

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP endpoint."""
        return f"http://{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """host:port of the gRPC endpoint."""
        return f"{self.address}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self.address}:{self.metrics_port}/metrics"

    def __enter__(self) -> TritonServer:
        try:
            for attempt in range(1, START_ATTEMPTS + 1):
                self._start()
                try:
                    self._wait_until_ready()
                    self._processes = set(self.model_processes())
                    break
                except ServerError:
                    # loading several Python models at once, Triton 2.51 now and then aborts over a lock of its own ("boost::interprocess::
                    # lock_exception"); what is wrong with a model or an argument ends it by a code, not by a signal
                    if attempt == START_ATTEMPTS or self.process is None or (self.process.poll() or 0) >= 0:
                        raise
                    self._end_process(0.0)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def _start(self) -> None:
        require_numpy_1()
        remove_leftovers()
        installation = find_installation()
        scratch = Path(self._scratch.name)
        # a repository of links to the wanted models: Triton then needs no model control, through which clients could load others
        chosen = scratch / "repository"
        shutil.rmtree(chosen, ignore_errors=True)  # of a start that failed
        chosen.mkdir()
        for model in self.models:
            if not (self.repository / model / "config.pbtxt").is_file():
                found = sorted(path.parent.name for path in self.repository.glob("*/config.pbtxt"))
                raise ServerError(f"model {model}: not in {self.repository}, which has {', '.join(found) or 'none'}")
            (chosen / model).symlink_to((self.repository / model).resolve(), target_is_directory=True)
        backends = prepared_backends(installation, scratch)
        command = [
            str(installation.binary),
            f"--model-repository={chosen}",
            "--model-control-mode=none",
            *([f"--backend-directory={backends}"] if backends else []),
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,shm-default-byte-size={SHM_BYTES}",
            f"--http-address={self.address}",
            f"--grpc-address={self.address}",
            f"--metrics-address={self.address}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={int(self._drain_timeout_s)}",
            *pool_arguments(chosen),
            *self._extra,
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:  # append: after a restart the log still says what the last server died of
            # a session of its own: Ctrl-C at the terminal reaches us only, and we decide how the server ends
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(installation),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"tritonserver ended with code {self.process.returncode} before it was ready:\n{self._log_faults()}")
            try:
                with urllib.request.urlopen(f"{self.http_url}/v2/health/ready", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise ServerError(f"tritonserver was not ready after {self._start_timeout_s:.0f} s:\n{self._log_faults()}")

    def _log_faults(self) -> str:
        lines = self.log.read_bytes()[self._log_start :].decode("utf-8", errors="replace").splitlines()
        return "\n".join(faults_in(lines) or lines[-LOG_EXCERPT_LINES:])

    def model_processes(self) -> dict[str, int]:
        """Process id of each model's Python process, a second one's under "MODEL 2", and of the server itself under "tritonserver"."""
        assert self.process is not None
        found = {"tritonserver": self.process.pid}
        for pid in _children(self.process.pid):
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue  # it ended while we looked
            for model in self.models:
                if any(f"/{model}/" in argument for argument in arguments):
                    number = sum(name.split()[0] == model for name in found) + 1
                    found[model if number == 1 else f"{model} {number}"] = pid
        return found

    def failure(self) -> str | None:
        """None while the server and all its models live, else what has died.

        Triton 2.51 neither restarts a model whose process has died nor stops calling it ready; every request to it fails.
        """
        if self.process is None or self.process.poll() is not None:
            return "tritonserver has ended" + ("" if self.process is None else f" with code {self.process.returncode}")
        dead = sorted({*self.models, *self._processes} - set(self.model_processes()))
        return f"the process of {', '.join(dead)} has died" if dead else None

    def stop(self, drain_timeout_s: float | None = None) -> None:
        """End the server: requests in flight may finish, then every process and every shared memory region of it goes.

        Args:
            drain_timeout_s: how long they may take; by default what the server was made with.
        """
        self._end_process(self._drain_timeout_s + 10 if drain_timeout_s is None else drain_timeout_s)
        self._scratch.cleanup()

    def _end_process(self, timeout_s: float) -> None:
        """End the server's process and what it has left: its group's processes, its shared memory regions."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        for region in SHM.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)


def remove_leftovers() -> None:
    """Remove shared memory and scratch folders of servers whose launcher was killed before it could."""
    for folder, prefix in ((SHM, SHM_PREFIX), (Path(tempfile.gettempdir()), SCRATCH_PREFIX)):
        for path in folder.glob(f"{prefix}*"):
            launcher = path.name.removeprefix(prefix).partition("-")[0]
            if launcher.isdigit() and not Path(f"/proc/{launcher}").exists():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _children(pid: int) -> list[int]:
    """Direct and indirect children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            direct = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *_children(child)]
    return found


def _end_with_parent() -> None:
    """In the child: be told to stop if this process is killed without a chance to say so."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def model_statistics(server: TritonServer, model: str) -> dict[str, float]:
    """Triton's own counts for one model: requests, executions, and mean queue and compute time in ms."""
    with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/stats", timeout=5) as response:
        (stats,) = json.load(response)["model_stats"]
    inference = stats["inference_stats"]
    succeeded = int(inference["success"]["count"])
    return {
        "requests": succeeded,
        "failed": int(inference["fail"]["count"]),
        "executions": int(stats["execution_count"]),
        "queue_ms": int(inference["queue"]["ns"]) / 1e6 / max(succeeded, 1),
        "compute_ms": int(inference["compute_infer"]["ns"]) / 1e6 / max(succeeded, 1),
    }
