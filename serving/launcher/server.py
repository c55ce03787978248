"""`TritonServer`: starts Triton on models of a repository, waits until they are ready, says whether they live, and ends them.

`make serve`, the demo, the evaluation, the benchmarks and the tests all use it. It does not restart anything: see supervisor.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from serving.contract.manifest import MANIFEST_FILE, Manifest, ManifestError
from serving.contract.versions import version_of
from serving.pipeline.request import REFUSING_FILE_VARIABLE

from .cleanup import SHM, SHM_PREFIX, Workspace, remove_leftovers
from .endpoints import LOOPBACK, PortError, fetch, free_ports, require_free_ports, tls_arguments
from .environment import SERVER_ALONE, environment, missing_guards, preloadable
from .installation import PROJECT, ServerError, find_installation, prepared_backends, require_supported
from .log import REQUEST_LOG, LogPump
from .multi_process import MultiProcessService, started_service
from .processes import GuardedProcess, model_processes
from .repository import has_python_process, models_of
from .statistics import model_statistics, questions_in_flight

# The names that other packages import from here.
__all__ = ["LOOPBACK", "SHM", "SHM_BYTES", "SHM_PREFIX", "TritonServer", "free_ports", "model_statistics", "models_of", "tls_arguments"]

# Shared memory that every model has from the start. It is enough for a crowd of questions: Triton seldom has to grow it, and it never
# shrinks.
SHM_BYTES = 8 << 20
CUDA_POOL_BYTES = 1 << 30  # a question of 40 x 256 tokens has 16 MB of hidden states at base size, and many are in flight
START_ATTEMPTS = 3
READY_POLL_S = 0.1
# How long no question must be in flight before the server counts as drained: the gauge is up to 0.25 s old, and a stream's end comes 0.3 s
# after its answer.
DRAIN_POLL_S, DRAIN_QUIET_S = 0.1, 0.7
# Triton's first act at its end is to wait for every open HTTP connection, also one that only keeps alive, for its whole exit timeout. Once
# it is drained only responses on their way to their clients can be left: they get this long.
LAST_RESPONSES_S = 2.0
NOT_READY_FILE_VARIABLE = "FIDO_NOT_READY_FILE"  # preload/readiness.c


class TritonServer:
    """A running tritonserver, as a context manager.

    Args:
        models: folders of the repository to load; no other model is loaded.
        repository: the model repository.
        ports: HTTP, gRPC and metrics; None takes free ones.
        address: to bind to.
        log: file for the server's output; None keeps it in the scratch folder. Requests go to REQUEST_LOG in the same folder.
        start_timeout_s: how long loading may take.
        drain_timeout_s: how long requests in flight may take to finish after the server was asked to stop.
        extra: more arguments for tritonserver.
        variables: environment variables that it has besides those of this process.
        multi_process: whether readers on a GPU get CUDA's multi-process service where it can be had (multi_process.py).
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
        variables: Mapping[str, str] | None = None,
        multi_process: bool = True,
    ):
        self.models, self.repository, self.address = tuple(models), Path(repository), address
        self.http_port, self.grpc_port, self.metrics_port = ports or free_ports(3)
        self._start_timeout_s, self._drain_timeout_s, self._extra = start_timeout_s, drain_timeout_s, tuple(extra)
        self._variables, self._multi_process = dict(variables or {}), multi_process
        self._workspace = Workspace()
        self.log = log or self._workspace.scratch / "tritonserver.log"
        self.triton: tuple[int, ...] | None = None  # version, once it is known
        self.missing_guards: list[str] = []  # one line for each preloaded library that the server runs without
        self._running: GuardedProcess | None = None
        self._pump: LogPump | None = None
        self._service: MultiProcessService | None = None
        self._python_models: list[str] = []
        self._is_drained = False
        self._processes: set[str] = set()  # names of the models' processes once the server was ready

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

    @property
    def request_log(self) -> Path:
        """File with one JSON object per request."""
        return self.log.parent / REQUEST_LOG

    @property
    def shm_prefix(self) -> str:
        """Start of the names of this server's shared memory regions."""
        return self._workspace.shm_prefix

    @property
    def _drain_files(self) -> dict[str, Path]:
        """Variable of the server's environment -> the file that it names. See `drain`."""
        scratch = self._workspace.scratch
        return {NOT_READY_FILE_VARIABLE: scratch / "not-ready", REFUSING_FILE_VARIABLE: scratch / "refusing"}

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The tritonserver process; None before the start and after the end."""
        return self._running.popen if self._running else None

    def __enter__(self) -> TritonServer:
        try:
            for attempt in range(1, START_ATTEMPTS + 1):
                self._start()
                try:
                    self._wait_until_ready()
                    break
                except PortError:
                    raise
                except ServerError:
                    # Loading several Python models at once, Triton 2.51 sometimes aborts over a lock of its own ("boost::interprocess::
                    # lock_exception"): that is a signal. A fault of a model or an argument is an exit code.
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
        remove_leftovers()
        installation = find_installation()
        require_supported(installation.triton)
        self.triton = installation.triton
        scratch = self._workspace.scratch
        chosen = self._chosen_repository(scratch)
        require_free_ports(self.address, (self.http_port, self.grpc_port, self.metrics_port))
        backends = prepared_backends(installation, scratch)
        preloaded = preloadable(scratch)
        self.missing_guards = missing_guards(preloaded)
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
        variables = environment(installation, preloaded)
        variables |= self._variables | {name: str(path) for name, path in self._drain_files.items()}
        alone = {name: variables.pop(name) for name in SERVER_ALONE if name in variables}
        if self._multi_process and self._service is None and on_gpu(chosen):
            self._service = started_service(scratch / "mps", variables)
        if self._service is not None:
            variables |= self._service.variables
        try:
            self._pump = LogPump(self.log, self.request_log)
        except OSError as error:
            raise ServerError(f"--log {self.log}: cannot be written: {error}") from error
        try:
            self._running = GuardedProcess(
                command,
                variables,
                alone,
                self._pump.write_fd,
                self._workspace.lock_fds,
                self._drain_timeout_s + 10,
                str(SHM / self.shm_prefix),
                str(scratch),
                # Triton 2.51 takes the memory of any shape that a client names before it looks at the data. Where the kernel grants memory
                # that it does not have (vm.overcommit_memory = 1), it would fill the machine; so it ends, and is brought back.
                0 if on_gpu(chosen) else memory_bound_bytes(),
            )
        finally:
            self._pump.close_write_end()

    def _chosen_repository(self, scratch: Path) -> Path:
        """A repository of links to the wanted models. With it Triton needs no model control, through which clients could load others."""
        chosen = scratch / "repository"
        shutil.rmtree(chosen, ignore_errors=True)  # of a start that failed
        chosen.mkdir()
        self._python_models = [model for model in self.models if has_python_process(self.repository, model)]
        for model in self.models:
            (chosen / model).symlink_to((self.repository / model).resolve(), target_is_directory=True)
        return chosen

    def _wait_until_ready(self) -> None:
        assert self.process is not None and self._pump is not None
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                excerpt = self._pump.excerpt()
                if "already in use" in excerpt:  # another process was faster than our check of the ports
                    require_free_ports(self.address, (self.http_port, self.grpc_port, self.metrics_port))
                raise ServerError(f"tritonserver ended with code {self.process.returncode} before it was ready:\n{excerpt}")
            try:
                fetch(f"{self.http_url}/v2/health/ready", timeout_s=1)
            except OSError:
                time.sleep(READY_POLL_S)
            else:
                self._processes = set(self.model_processes())
                self._require_supported()
                return
        raise ServerError(f"tritonserver was not ready after {self._start_timeout_s:.0f} s:\n{self._pump.excerpt()}")

    def _require_supported(self) -> None:
        """Ask the server for its version if no file has told it."""
        if self.triton is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.triton = version_of(str(json.loads(fetch(f"{self.http_url}/v2", timeout_s=5))["version"])) or None
            require_supported(self.triton)

    def model_processes(self) -> dict[str, int]:
        """Process ids: of tritonserver under that name, of each Python model under MODEL, of its second process under "MODEL 2"."""
        assert self.process is not None
        return {"tritonserver": self.process.pid, **model_processes(self.process.pid, self.models)}

    def failure(self) -> str | None:
        """None while the server and the processes of all its models live, else which have died.

        Triton 2.51 does not restart a model whose process has died, and still says that it is ready; every request to it fails.
        """
        if self.process is None or self.process.poll() is not None:
            return "tritonserver has ended" + ("" if self.process is None else f" with code {self.process.returncode}")
        dead = sorted({*self._python_models, *self._processes} - set(self.model_processes()))
        return f"the process of {', '.join(dead)} has died" if dead else None

    def drain(self, timeout_s: float | None = None, delay_s: float = 0.0, hurry: threading.Event | None = None) -> bool:
        """Prepare the end: say that the server is not ready, then refuse new questions, then wait for the answers of all in flight.

        Args:
            timeout_s: how long the questions in flight may take; None takes the server's own.
            delay_s: between the first two, for balancers that ask whether the server is ready.
            hurry: ends the waiting when it is set.

        Returns:
            Whether all questions in flight were answered.
        """
        hurry = hurry or threading.Event()
        not_ready, refusing = self._drain_files.values()
        not_ready.touch()
        hurry.wait(delay_s)
        refusing.touch()
        deadline_s = time.monotonic() + (self._drain_timeout_s if timeout_s is None else timeout_s)
        quiet_since_s: float | None = None
        while not hurry.wait(DRAIN_POLL_S) and time.monotonic() < deadline_s and self.failure() is None:
            try:
                is_quiet = questions_in_flight(self.metrics_url) == 0
            except OSError:  # no metrics: Triton's own end waits for its inferences
                break
            quiet_since_s = (quiet_since_s or time.monotonic()) if is_quiet else None
            if quiet_since_s is not None and time.monotonic() - quiet_since_s >= DRAIN_QUIET_S:
                self._is_drained = True
                break
        return self._is_drained

    def stop(self, drain_timeout_s: float | None = None) -> None:
        """End the server: requests in flight may finish, then its processes, shared memory regions and scratch folder are removed.

        Args:
            drain_timeout_s: how long they may take; None takes the server's own.
        """
        self._end_process(self._drain_timeout_s + 10 if drain_timeout_s is None else drain_timeout_s)
        if self._service is not None:
            self._service.stop()
            self._service = None
        self._workspace.remove()

    def _waits_for_connections(self, pid: int) -> bool:
        """Whether a drained Triton has not begun to unload its models."""
        return self._is_drained and set(model_processes(pid, self._python_models)) >= self._processes - {"tritonserver"}

    def _end_process(self, timeout_s: float) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.end(timeout_s, lambda: self._waits_for_connections(running.popen.pid), LAST_RESPONSES_S)
            self._workspace.remove_regions()
        if self._pump is not None:
            self._pump.join()


def memory_bound_bytes() -> int:
    """What a process of a server on the CPU may take: twice this machine's memory, since stacks and heaps are not used whole."""
    return max(2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 16 << 30)


def on_gpu(repository: Path) -> bool:
    """Whether a model of the repository runs on a GPU."""

    def is_on_gpu(directory: Path) -> bool:
        try:
            return Manifest.load(directory).on_gpu
        except ManifestError:
            return False  # the model says what is wrong when it loads

    return any(is_on_gpu(path.parent) for path in repository.glob(f"*/*/{MANIFEST_FILE}"))


def pool_arguments(repository: Path) -> list[str]:
    """Arguments for Triton's pool of GPU memory, through which GPU models pass hidden states; none if no model runs on a GPU."""
    return [f"--cuda-memory-pool-byte-size=0:{CUDA_POOL_BYTES}"] if on_gpu(repository) else []
