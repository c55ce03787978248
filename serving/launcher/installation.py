"""Finds a Triton server and prepares its Python backend for this Python.

It looks in three places, in this order: $TRITONSERVER, NVIDIA's container, the PyPI wheel `nvidia-pytriton`. The wheel is installed
without its dependencies: we use the server in it and do not import its Python API. Starts nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
PROJECT = Path(__file__).resolve().parents[2]


class ServerError(RuntimeError):
    """The server could not be found, did not start, or did not stop."""


@dataclasses.dataclass(frozen=True)
class Installation:
    """A tritonserver binary and what it needs around it.

    Attributes:
        binary: the program.
        backends: folder of its backends; None is the one that it was built with.
        stub: program of the Python backend for this Python; None if the backend has its own.
        libraries: folders for LD_LIBRARY_PATH.
    """

    binary: Path
    backends: Path | None = None
    stub: Path | None = None
    libraries: tuple[Path, ...] = ()


def find_installation() -> Installation:
    """Find the server to run.

    Raises:
        ServerError: if there is no server, or none for this Python.
    """
    if path := os.environ.get("TRITONSERVER"):
        if not os.access(path, os.X_OK):
            raise ServerError(f"TRITONSERVER={path}: wanted an executable file")
        return Installation(Path(path))
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
        raise ServerError(f"nvidia-pytriton: wanted a Python backend for Python {sys.version.split()[0]}, got one for {', '.join(found)}")
    # The stub is linked against libpython, which a statically linked Python does not have.
    folder, library = Path(str(sysconfig.get_config_var("LIBDIR"))), "libpython{}.{}.so.1.0".format(*sys.version_info[:2])
    folders = [folder, folder / str(sysconfig.get_config_var("MULTIARCH") or "")]
    if not any((f / library).is_file() for f in folders):
        raise ServerError(f"{library}: wanted in {folder} by the Python backend, not found; install it (Debian: libpython3.x)")
    return Installation(server / "bin" / "tritonserver", server / "backends", stub, (package.parent / "nvidia_pytriton.libs", *folders))


def require_numpy_1() -> None:
    """Refuse NumPy 2: with it, Triton 2.51's Python backend returns empty outputs, and text inputs end the process without an error.

    Raises:
        ServerError: if another major version is installed.
    """
    version = importlib.metadata.version("numpy")
    if version.split(".")[0] != "1":
        raise ServerError(f"numpy: wanted 1.26, got {version}, with which Triton 2.51's Python backend returns empty outputs; `make setup`")


def prepared_backends(installation: Installation, scratch: Path) -> Path | None:
    """A copy of the Python backend under `scratch` with the right stub in it; the wheel itself is not changed."""
    if installation.backends is None or installation.stub is None:
        return installation.backends
    python = scratch / "backends" / "python"
    shutil.rmtree(python, ignore_errors=True)  # of a start that failed: a program that still runs cannot be overwritten
    shutil.copytree(installation.backends / "python", python)
    stub = python / "triton_python_backend_stub"
    shutil.copyfile(installation.stub, stub)
    stub.chmod(0o755)
    return python.parent
