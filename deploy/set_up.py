"""`make setup`: a virtual environment with the packages that a task needs, and no others.

    python3 deploy/set_up.py serve      what serves, asks and runs the demo: no torch
    python3 deploy/set_up.py export     and torch, to export checkpoints (without a GPU: its CPU build)
    python3 deploy/set_up.py evaluate   and the demo's corpus
    python3 deploy/set_up.py openvino   and OpenVINO, for faster CPU engines
    python3 deploy/set_up.py frameworks and the RAG frameworks that the client has adapters for
    python3 deploy/set_up.py dev        everything: tests, benchmarks, training, lint

Python, glibc and free disk are checked before anything is downloaded. Runs on any Python from 3.8 on, without packages; the environment is
made with a Python that the packages have wheels for. A line per package says what is downloaded; the last line sums it up, and is kept in
the environment as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from serving.contract import versions  # noqa: E402  needs no package

OWN_SERVER = bool(os.environ.get("TRITONSERVER"))  # then another Triton than the wheel's decides which Python and which NumPy fit
PYTHONS = (versions.OWN if OWN_SERVER else versions.WHEEL).python
GLIBC = versions.WHEEL.glibc or versions.Span((0,), None)
# Requirement files of each set, what it needs before it, and free megabytes of disk.
SETS = {
    "serve": (["requirements.txt"], [], 700),
    "export": (["requirements-export.txt"], ["serve"], 2500),
    "evaluate": (["requirements-evaluate.txt"], ["serve"], 300),
    "openvino": (["requirements-openvino.txt"], ["serve"], 1000),
    "frameworks": (["requirements-frameworks.txt"], ["serve", "evaluate"], 1000),
    "dev": (["requirements-dev.txt"], ["serve", "export", "evaluate", "openvino"], 3000),
}
SERVER = "requirements-triton.txt"
VENV_ADVICE = "on Debian and Ubuntu, install python3-venv"
# PyTorch's own index of CPU builds, a twentieth as large as the build for CUDA; PyPI where it cannot be reached. Empty: PyPI at once.
TORCH_CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
# Libraries that tritonserver preloads: they bound its memory, keep cancelled streams from stopping it, and say when it is about to end.
PRELOADED = ("heap_trim", "stream_locks", "readiness")
SIZE = re.compile(r"^\s*(?:Downloading|(Using cached)) (\S+?)-\d(\S*) \(([\d.]+) ([kMG]?)B\)", re.I)
LOCAL = re.compile(r"^Processing (\S+\.whl)")
MEGABYTES = {"": 1e-6, "k": 1e-3, "M": 1.0, "G": 1e3}


def main() -> int:
    """Check, install, sum up."""
    parser = argparse.ArgumentParser(prog="python3 deploy/set_up.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("set", choices=list(SETS), nargs="?", default="serve")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    arguments = parser.parse_args()
    needed = SETS[arguments.set][1]
    python = arguments.venv / "bin" / "python"
    version = version_of(str(python))
    if version and version not in PYTHONS:
        stop(f"{arguments.venv}: wanted Python {PYTHONS}, got {_dotted(version)}; remove the folder, or pass VENV=path for another one")
    todo = [name for name in (*needed, arguments.set) if not version or not _is_done(arguments.venv, name)]
    own_server = OWN_SERVER
    check_platform(own_server=own_server)
    check_disk(arguments.venv, sum(SETS[name][2] for name in todo))
    if todo:
        make_environment(arguments.venv, find_python() if version is None else str(python))
    for name in todo:
        install(name, python, arguments.venv, own_server=own_server)
    return 0


def make_environment(venv: Path, interpreter: str) -> None:
    """Make the environment, or give pip to one that lacks it: one that was stopped half-way, or that uv made."""
    python = venv / "bin" / "python"
    if interpreter == str(python):
        if subprocess.run([interpreter, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            print(f"set-up: {venv} has no pip; adding it", flush=True)
            run([interpreter, "-m", "ensurepip"], f"{VENV_ADVICE}, and remove {venv}")
        return
    print(f"set-up: {venv} with {interpreter}", flush=True)
    # An environment whose Python is gone keeps links to it, which venv follows unless told to begin anew.
    begin_anew = ["--clear"] if (venv / "pyvenv.cfg").is_file() else []
    run([interpreter, "-m", "venv", *begin_anew, str(venv)], VENV_ADVICE)


def install(name: str, python: Path, venv: Path, *, own_server: bool) -> None:
    """One set of packages. Its stamp is written last."""
    started, (files, _, _) = time.perf_counter(), SETS[name]
    downloaded, packages = 0.0, 0
    wanted: list[Sequence[str]] = []
    if name in ("export", "dev") and TORCH_CPU_INDEX and not _has_gpu() and not _has_package(python, "torch"):
        torch = next(line for line in (ROOT / "requirements-export.txt").read_text().splitlines() if line.startswith("torch=="))
        megabytes, count = pip(
            python, ["--no-deps", "--timeout", "5", "--retries", "0", "--index-url", TORCH_CPU_INDEX, torch], may_fail=True
        )
        downloaded, packages = downloaded + megabytes, packages + count
    wanted += [["-r", str(ROOT / file)] for file in files]
    if name == "serve" and not own_server:
        wanted.append(["--no-deps", "-r", str(ROOT / SERVER)])
    for arguments in wanted:
        megabytes, count = pip(python, arguments)
        downloaded, packages = downloaded + megabytes, packages + count
    if name == "serve":
        compile_guards(venv)
    seconds, on_disk = time.perf_counter() - started, _megabytes_in(venv)
    print(
        f"set-up: {name}: {packages} packages, {downloaded:.0f} MB downloaded, {on_disk:.0f} MB in {venv.name}, {seconds:.0f} s", flush=True
    )
    summary = {"packages": packages, "downloaded_mb": round(downloaded), "on_disk_mb": round(on_disk), "seconds": round(seconds, 1)}
    stamp_of(venv, name).write_text(json.dumps(summary) + "\n")


def pip(python: Path, arguments: Sequence[str], *, may_fail: bool = False) -> tuple[float, int]:
    """Run pip install with a line of progress per package; returns megabytes and packages."""
    command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off", "--disable-pip-version-check", *arguments]
    megabytes, packages, lines = 0.0, 0, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            size = _size_of(line)
            if size is not None:
                packages += 1
                megabytes += size[1]
                print(f"  {size[0]:32} {size[1]:8.1f} MB" if size[1] else f"  {size[0]:32}   cached", flush=True)
    if process.returncode and not may_fail:
        stop("".join(lines[-15:]) + "set-up: pip failed; the lines above say why")
    return (0.0, 0) if process.returncode else (megabytes, packages)


def _size_of(line: str) -> tuple[str, float] | None:
    """Package and downloaded megabytes of a line that pip prints for a wheel; none are downloaded of one in pip's cache."""
    found = SIZE.match(line)
    if found and not found.group(3).endswith(".metadata"):
        cached, name, _, number, unit = found.groups()
        return name, 0.0 if cached else float(number) * MEGABYTES[unit]
    local = LOCAL.match(line)
    if local and os.path.isfile(local.group(1)):
        return os.path.basename(local.group(1)).split("-")[0], os.path.getsize(local.group(1)) / 1e6
    return None


def find_python() -> str:
    """The first Python that the packages have wheels for: the one that runs this, then those on the PATH."""
    seen = []
    newest_first = [f"python3.{minor}" for minor in range((PYTHONS.last or PYTHONS.first)[1], PYTHONS.first[1] - 1, -1)]
    for name in (sys.executable, *newest_first, "python3", "python"):
        path = name and shutil.which(name)
        if not path:
            continue
        version = version_of(path)
        if version and version in PYTHONS:
            return path
        seen.append(f"{path} {_dotted(version) if version else '(does not start)'}")
    stop(
        f"Python: wanted {PYTHONS}, got {', '.join(dict.fromkeys(seen)) or 'none'}; "
        "install one of them (for example `uv python install 3.12`) and pass PYTHON=path"
    )


def version_of(python: str) -> tuple[int, ...] | None:
    """Major and minor version of an interpreter, or None if it does not start."""
    command = [python, "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        asked = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    return tuple(int(part) for part in asked.stdout.split() if part.isdigit()) if asked.returncode == 0 else None


def check_platform(*, own_server: bool) -> None:
    """Stop unless the wheel's server runs here; a server of the user's own, named by TRITONSERVER, is not checked."""
    if own_server:
        return
    advice = "or name a server of your own by TRITONSERVER=path (docs/operating.md)"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        stop(f"platform: wanted Linux on x86_64, as the wheel's server, got {sys.platform} on {platform.machine()}; {advice}")
    name, version = platform.libc_ver()
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or found not in GLIBC:
        stop(f"glibc: wanted {GLIBC} (Ubuntu 22.04, Debian 12), got {name or 'another C library'} {version}; {advice}")


def check_disk(venv: Path, megabytes: int) -> None:
    """Stop if the disk of the environment has less free."""
    place = next(folder for folder in (venv, *venv.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(str(place)).free / 1e6
    if free < megabytes:
        stop(f"disk: wanted {megabytes:,} MB free in {place}, got {free:,.0f} MB; free some, or pass VENV=path on another disk")


def compile_guards(venv: Path) -> None:
    """Compile what tritonserver preloads; without a C compiler it serves without them, which `make serve` says."""
    if shutil.which("cc") is None:
        print(f"set-up: no C compiler, so without {', '.join(PRELOADED)} (`make serve` names the risks)", flush=True)
        return
    for name in PRELOADED:
        source, library = ROOT / "serving" / "launcher" / "preload" / f"{name}.c", venv / "lib" / f"lib{name}.so"
        run(["cc", "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)], "see the compiler's lines above")


def run(command: Sequence[str], advice: str) -> None:
    """Run a command, or stop with advice."""
    if subprocess.run(list(command)).returncode:
        stop(f"set-up: {' '.join(command)}: failed; {advice}")


def stamp_of(venv: Path, name: str) -> Path:
    """The file that says that a set is installed, and what it cost."""
    return venv / f".{name}"


def _is_done(venv: Path, name: str) -> bool:
    """Whether a set is installed from the requirement files as they are."""
    stamp = stamp_of(venv, name)
    files = [ROOT / file for file in SETS[name][0]]
    return stamp.is_file() and all(file.stat().st_mtime <= stamp.stat().st_mtime for file in files)


def _has_gpu() -> bool:
    return os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None


def _has_package(python: Path, name: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {name}"], stderr=subprocess.DEVNULL).returncode == 0


def _megabytes_in(folder: Path) -> float:
    return sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(str(folder)) for name in names) / 1e6


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def stop(message: str) -> NoReturn:
    """End with a message of one line, or of what failed."""
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    sys.exit(main())
