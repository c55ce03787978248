"""Free heap goes back to the system: glibc alone keeps it below a block that is still in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.repository import repository_from_engines
from serving.contract.limits import Limits
from serving.launcher.environment import HEAP_TRIM, NO_THREAD_CACHES, environment
from serving.launcher.installation import find_installation
from serving.launcher.server import TritonServer, models_of

# fills 100 MB of heap with small blocks, frees all but the last, and prints resident memory until it has shrunk
PROGRAM = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
blocks = [libc.malloc(1000) for _ in range(100_000)]
for block in blocks:
    ctypes.memset(block, 1, 1000)
for block in blocks[:-1]:
    libc.free(block)
del blocks
deadline = time.monotonic() + 15
while resident() - before > 30e6 and time.monotonic() < deadline:
    time.sleep(0.2)
print(resident() - before)
"""


def grown_bytes(env: dict[str, str]) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not HEAP_TRIM.is_file(), reason="there was no C compiler at `make setup`")
def test_what_is_free_is_given_back() -> None:
    env = environment(find_installation())
    assert str(HEAP_TRIM) in env["LD_PRELOAD"].split()
    assert grown_bytes(env) < 30e6
    assert grown_bytes({**os.environ}) > 60e6


@pytest.mark.server
@pytest.mark.skipif(not HEAP_TRIM.is_file(), reason="there was no C compiler at `make setup`")
def test_tritonserver_alone_goes_without_thread_caches(engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    with TritonServer(models_of(["fido"], stream=False), tmp_path / "repository") as server:
        settings = {
            name: [line for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line.startswith("GLIBC_TUNABLES=")]
            for name, pid in server.model_processes().items()
        }
    assert settings == {"tritonserver": [f"GLIBC_TUNABLES={NO_THREAD_CACHES}"], "fido": [], "fido_encoder": []}
