"""Finding a Triton server and making its Python backend run in this environment.

Three places, in this order: $TRITONSERVER, NVIDIA's container, the PyPI wheel `nvidia-pytriton` (installed without its dependencies and
used for the server in it alone: its own Python API is not imported).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
PROJECT = Path(__file__).resolve().parents[2]
# glibc gives up to eight heaps a core to the threads of a process, each keeps what its largest burst has taken, and what is large enough to
# be given back to the system grows with what was freed before. One heap a core, and large blocks always given back: memory is lower and
# stops growing sooner (tests/stress soaks it). Fewer heaps than cores would make threads wait for each other, tokenizing above all.
LARGE_BLOCK_BYTES = 256 << 10
# of heap_trim.c and stream_locks.c, which `make setup` compiles where there is a compiler
HEAP_TRIM, STREAM_LOCKS = (Path(sys.prefix, "lib", f"lib{name}.so") for name in ("heap_trim", "stream_locks"))
# Each thread keeps free blocks of its own, which no trimming gives back: with Triton's 240 threads more than all that was in use,
# and growing for hours. heap_trim.c keeps this from the models: their threads are few, and tokenizing wants its blocks near.
NO_THREAD_CACHES = "glibc.malloc.tcache_count=0"


class ServerError(RuntimeError):
    """The server could not be found, did not start, or did not stop."""


@dataclasses.dataclass(frozen=True)
class Installation:
    """A tritonserver binary and what it needs around it.

    Attributes:
        backends: its backend directory, None for the one it was built with.
        stub: the Python backend's stub for this Python, None where the backend has its own.
        libraries: folders for LD_LIBRARY_PATH.
    """

    binary: Path
    backends: Path | None = None
    stub: Path | None = None
    libraries: tuple[Path, ...] = ()


def find_installation() -> Installation:
    """The server to run.

    Raises:
        ServerError: if there is none, or none for this Python.
    """
    if given := os.environ.get("TRITONSERVER"):
        if not os.access(given, os.X_OK):
            raise ServerError(f"TRITONSERVER={given}: wanted an executable file")
        return Installation(Path(given))
    if CONTAINER_SERVER.is_file():
        return Installation(CONTAINER_SERVER)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("no tritonserver: neither $TRITONSERVER, nor NVIDIA's container, nor the nvidia-pytriton wheel (`make setup`)")
    package = Path(next(iter(spec.submodule_search_locations)))
    server = package / "tritonserver"
    stub = server / "python_backend_stubs" / "{}.{}".format(*sys.version_info[:2]) / "triton_python_backend_stub"
    if not stub.is_file():
        found = sorted(path.name for path in (server / "python_backend_stubs").glob("*"))
        raise ServerError(f"the wheel's Python backend has no stub for Python {sys.version.split()[0]}, only for {', '.join(found)}")
    # the stub is linked against libpython, which a Python built as a static executable does not bring along
    folder, library = Path(str(sysconfig.get_config_var("LIBDIR"))), "libpython{}.{}.so.1.0".format(*sys.version_info[:2])
    folders = [folder, folder / str(sysconfig.get_config_var("MULTIARCH") or "")]
    if not any((f / library).is_file() for f in folders):
        raise ServerError(f"{library} is not in {folder}: the Python backend needs it; install it (Debian: libpython3.x) and try again")
    return Installation(server / "bin" / "tritonserver", server / "backends", stub, (package.parent / "nvidia_pytriton.libs", *folders))


def require_numpy_1() -> None:
    """Refuse NumPy 2: in Triton 2.51's Python backend outputs come back empty under it and text inputs end the process, without an error.

    Raises:
        ServerError: if another major version is installed.
    """
    version = importlib.metadata.version("numpy")
    if version.split(".")[0] != "1":
        raise ServerError(f"numpy: wanted 1.26, got {version}, with which Triton 2.51's Python backend returns empty outputs; `make setup`")


def prepared_backends(installation: Installation, scratch: Path) -> Path | None:
    """A backend directory with the right stub in it, under `scratch`; the wheel's own is left as it is."""
    if installation.backends is None or installation.stub is None:
        return installation.backends
    python = scratch / "backends" / "python"
    shutil.rmtree(python, ignore_errors=True)  # of a start that failed: what may still run cannot be overwritten
    shutil.copytree(installation.backends / "python", python)
    stub = python / "triton_python_backend_stub"
    shutil.copyfile(installation.stub, stub)
    stub.chmod(0o755)
    return python.parent


def malloc_settings() -> dict[str, str]:
    """How glibc's allocator is set for a server that runs for months; what the environment says itself goes before it."""
    return {
        "MALLOC_ARENA_MAX": str(max(2, len(os.sched_getaffinity(0)))),
        "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(LARGE_BLOCK_BYTES),
    }


def environment(installation: Installation) -> dict[str, str]:
    """Environment variables for the server: this environment's packages and this project for its Python models."""
    env = {**malloc_settings(), **os.environ}
    paths = [str(PROJECT), *site.getsitepackages()]
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    libraries = [str(folder) for folder in installation.libraries]
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    if HEAP_TRIM.is_file():
        env.setdefault("GLIBC_TUNABLES", NO_THREAD_CACHES)
    preloaded = [str(library) for library in (HEAP_TRIM, STREAM_LOCKS) if library.is_file()]
    if preloaded:
        env["LD_PRELOAD"] = " ".join([*filter(None, [env.get("LD_PRELOAD")]), *preloaded])
    return env
