"""CUDA's multi-process service for one server: kernels of its encoder and reader processes run side by side on the GPU, not in turns.

Comes in: a folder for its pipes, and the server's environment. Goes out: a `MultiProcessService`, or None where it cannot be had: the
processes then take turns.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .processes import GuardedProcess

CONTROL = "nvidia-cuda-mps-control"  # of the driver
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
SOCKET = "control"  # in the folder of pipes, once the daemon listens
START_TIMEOUT_S, PROBE_TIMEOUT_S, END_TIMEOUT_S, POLL_S = 10.0, 60.0, 10.0, 0.05
# A process that gets a context on the GPU. The driver goes on without the service where it cannot connect to it, so that only the daemon
# can say whether there was a client.
PROBE = """
import ctypes
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
raise SystemExit(failed or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
"""


class MultiProcessService:
    """A daemon of one server's own, which ends with this process. `variables` lead the server's processes to it.

    Args:
        folder: for its pipes and logs; a short path, since sockets lie in it.
        environment: of the server. Its CUDA_VISIBLE_DEVICES is not for the daemon, which would number the GPUs that it sees anew.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.variables = {PIPES: str(folder), LOGS: str(folder)}
        self._folder, self._clients = folder, {**environment, **self.variables}
        self._environment = {name: value for name, value in self._clients.items() if name != "CUDA_VISIBLE_DEVICES"}
        self._daemon: GuardedProcess | None = None

    def start(self) -> bool:
        """Start the daemon and try it. Where that fails nothing of it is left."""
        devnull = os.open(os.devnull, os.O_WRONLY)
        try:
            self._daemon = GuardedProcess([CONTROL, "-f"], self._environment, {}, devnull, (), END_TIMEOUT_S)
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not (self._folder / SOCKET).exists():
                if self._daemon.popen.poll() is not None or time.monotonic() > deadline_s:
                    raise OSError(f"{CONTROL} does not listen")
                time.sleep(POLL_S)
            subprocess.run([sys.executable, "-c", PROBE], env=self._clients, timeout=PROBE_TIMEOUT_S, check=True, capture_output=True)
            if not self._ask("get_server_list").strip():
                raise OSError(f"{CONTROL} has no client")
        except (OSError, subprocess.SubprocessError):
            self.stop()
            return False
        finally:
            os.close(devnull)
        return True

    def stop(self) -> None:
        """End the daemon and what it started. The server's processes have ended before. A second call does nothing."""
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                self._ask("quit -t 5")
            daemon.end(END_TIMEOUT_S)

    def _ask(self, command: str) -> str:
        """The daemon's answer."""
        settings: Any = {"env": self._environment, "timeout": END_TIMEOUT_S, "capture_output": True, "text": True}
        return subprocess.run([CONTROL], input=f"{command}\n", check=False, **settings).stdout


def started_service(folder: Path, environment: Mapping[str, str]) -> MultiProcessService | None:
    """A running service for a server, or None: CUDA_MPS_PIPE_DIRECTORY names another, or the driver's program is missing or fails."""
    if PIPES in environment or shutil.which(CONTROL, path=environment.get("PATH", os.defpath)) is None:
        return None
    service = MultiProcessService(folder, environment)
    return service if service.start() else None
