"""Finds a Triton server and prepares its Python backend for this Python.

It looks in three places, in this order: $TRITONSERVER, NVIDIA's container, the PyPI wheel `nvidia-pytriton`. The wheel is installed
without its dependencies: we use the server in it and do not import its Python API. Starts nothing.
"""

from __future__ import annotations

import dataclasses
import filecmp
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

from serving.contract.versions import NUMPY_1, WHEEL, dotted, version_of

CONTAINER_SERVER = Path("/opt/tritonserver/bin/tritonserver")
# sysconfig fills its table at the first question, and a second thread that asks meanwhile finds it empty
_SYSCONFIG_LOCK = threading.Lock()
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
        triton: version of the server; None if only the running server can tell.
    """

    binary: Path
    backends: Path | None = None
    stub: Path | None = None
    libraries: tuple[Path, ...] = ()
    triton: tuple[int, ...] | None = None


def find_installation() -> Installation:
    """Find the server to run.

    Raises:
        ServerError: if there is no server, or none for this Python.
    """
    if path := os.environ.get("TRITONSERVER"):
        if not os.access(path, os.X_OK):
            raise ServerError(f"TRITONSERVER={path}: wanted an executable file")
        return _installed_as_a_tree(Path(path))
    if CONTAINER_SERVER.is_file():
        return _installed_as_a_tree(CONTAINER_SERVER)
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
    library = "libpython{}.{}.so.1.0".format(*sys.version_info[:2])
    with _SYSCONFIG_LOCK:
        libdir, multiarch = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("MULTIARCH")
    folder = Path(str(libdir))
    folders = [folder, folder / str(multiarch or "")]
    if not any((f / library).is_file() for f in folders):
        raise ServerError(f"{library}: wanted in {folder} by the Python backend, not found; install it (Debian: libpython3.x)")
    libraries = (package.parent / "nvidia_pytriton.libs", *folders)
    return Installation(server / "bin" / "tritonserver", server / "backends", stub, libraries, WHEEL.triton.first)


def _installed_as_a_tree(binary: Path) -> Installation:
    """A server in the layout of NVIDIA's builds: ROOT/bin/tritonserver, ROOT/backends, ROOT/TRITON_VERSION.

    Without backends beside it, the server looks where it was built to look.
    """
    root = binary.resolve().parent.parent
    backends = root / "backends"
    if not (backends / "python").is_dir():
        return Installation(binary)
    _require_stub_of_this_python(backends / "python" / "triton_python_backend_stub")
    try:
        triton = version_of((root / "TRITON_VERSION").read_text(encoding="utf-8")) or None
    except OSError:
        triton = None
    return Installation(binary, backends, triton=triton)


def _require_stub_of_this_python(stub: Path) -> None:
    """Refuse a Python backend that was built for another Python: its models would import packages of this one, and die of it."""
    try:
        linked = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    except OSError:
        return  # the server says what is missing
    here = "{}.{}".format(*sys.version_info[:2])
    if linked and linked.group(1).decode() != here:
        raise ServerError(
            f"{stub}: built for Python {linked.group(1).decode()}, this is {here}; "
            f"make an environment with that Python (`make setup PYTHON=python{linked.group(1).decode()} VENV=path`)"
        )


def require_supported(triton: tuple[int, ...] | None) -> None:
    """Refuse a server that is too old, and a NumPy that it does not work with.

    Args:
        triton: its version. Nothing is known, and nothing refused, if None: the launcher asks again once the server runs.

    Raises:
        ServerError: naming both versions.
    """
    if triton is None:
        return
    if triton < WHEEL.triton.first:
        raise ServerError(
            f"Triton: wanted {dotted(WHEEL.triton.first)} or later, got {dotted(triton)}; use NVIDIA's container or the wheel"
        )
    numpy = importlib.metadata.version("numpy")
    if NUMPY_1.needed(triton) and version_of(numpy) not in WHEEL.numpy:
        raise ServerError(f"numpy: wanted {WHEEL.numpy} for Triton {dotted(triton)}, got {numpy}: {NUMPY_1.fault}; `make setup`")


def prepared_backends(installation: Installation, scratch: Path) -> Path | None:
    """A copy of the Python backend under `scratch` with the right stub in it; the wheel itself is not changed.

    Nothing is copied where the right stub lies in the backend already, as in the container.
    """
    if installation.backends is None or installation.stub is None:
        return installation.backends
    in_place = installation.backends / "python" / "triton_python_backend_stub"
    if in_place.is_file() and filecmp.cmp(in_place, installation.stub, shallow=False):
        return installation.backends
    python = scratch / "backends" / "python"
    shutil.rmtree(python, ignore_errors=True)  # of a start that failed: a program that still runs cannot be overwritten
    shutil.copytree(installation.backends / "python", python)
    stub = python / "triton_python_backend_stub"
    shutil.copyfile(installation.stub, stub)
    stub.chmod(0o755)
    return python.parent
