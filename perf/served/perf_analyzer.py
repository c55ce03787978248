"""NVIDIA's perf_analyzer: found or installed for this machine, and run for one load point.

Comes in: a model, a file of requests, a load. Goes out: when each request was sent and each of its responses came, from perf_analyzer's own
profile export. Nothing is averaged here.

The wheel `perf-analyzer` needs glibc 2.38; below that pip installs a placeholder without a program, so the program inside the wheel
`tritonclient` 2.51 is taken, with the two libraries that it wants.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOME = Path("build/perf_analyzer")
NEW_GLIBC = (2, 38)
NEW_WHEELS = ("perf-analyzer==2.60.0",)
OLD_WHEELS = ("tritonclient==2.51.0", "nvidia-cuda-runtime-cu12==12.3.101")
DEBIAN_PACKAGE = "libb64-0d"
# A window of mixed lengths is never stable by perf_analyzer's own measure, which then gives up and writes nothing.
ANY_STABILITY = "999"


class PerfAnalyzerError(RuntimeError):
    """perf_analyzer cannot be had here, or did not measure."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One request: nanoseconds from the first one's start.

    Attributes:
        sent: when it was sent.
        responses: when each response came; one of a unary model.
        ok: whether it was answered.
    """

    sent: int
    responses: tuple[int, ...]
    ok: bool = True


@dataclasses.dataclass(frozen=True)
class PerfAnalyzer:
    """A program that runs here."""

    binary: Path
    libraries: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """For its process: its libraries before all others."""
        paths = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return os.environ | ({"LD_LIBRARY_PATH": os.pathsep.join(paths)} if paths else {})

    def version(self) -> str:
        """What it says of itself.

        Raises:
            PerfAnalyzerError: if it does not run.
        """
        try:
            done = subprocess.run([str(self.binary), "--version"], capture_output=True, text=True, env=self.environment(), timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PerfAnalyzerError(f"{self.binary} does not run: {error}") from error
        said = (done.stdout + done.stderr).strip()
        if done.returncode or "erf" not in said:
            raise PerfAnalyzerError(f"{self.binary} does not run: {said[-300:]}")
        return next(line for line in said.splitlines() if "erf" in line).strip()

    def measure(
        self,
        model: str,
        grpc_url: str,
        input_data: Path,
        load: Sequence[str],
        requests: int,
        *,
        streaming: bool,
        csv: Path,
        timeout_s: float,
    ) -> list[Timeline]:
        """Run one load point to its end.

        Args:
            load: what makes it, such as ("--concurrency-range", "4").
            requests: how many are sent.
            csv: perf_analyzer's own report.
            timeout_s: after which it is ended.

        Returns:
            Every request, in the order of their sending.

        Raises:
            PerfAnalyzerError: if it fails or writes no export; the message ends with what it printed last.
        """
        with tempfile.TemporaryDirectory() as scratch:
            export = Path(scratch, "export.json")
            command = [str(self.binary), "-m", model, "-i", "grpc", "-u", grpc_url, "--input-data", str(input_data), *load]
            command += ["--request-count", str(requests), "-s", ANY_STABILITY, "-r", "1", "-f", str(csv), "--verbose-csv"]
            command += ["--profile-export-file", str(export), *(["--streaming"] if streaming else []), "-a"]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, env=self.environment(), stdin=subprocess.DEVNULL, timeout=timeout_s
                )
            except subprocess.TimeoutExpired as error:
                raise PerfAnalyzerError(f"{model}, {' '.join(load)}: not done after {timeout_s:.0f} s") from error
            if not export.exists():
                said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
                raise PerfAnalyzerError(f"{model}, {' '.join(load)}: perf_analyzer ended with {done.returncode} and no export:\n{said}")
            # the export repeats the inputs, numbers among them as the bytes that they are, which are no UTF-8
            return timelines(json.loads(export.read_bytes().decode("utf-8", errors="replace"), strict=False))


def timelines(export: dict[str, Any]) -> list[Timeline]:
    """Requests of a profile export, in the order of their sending."""
    requests = [request for experiment in export["experiments"] for request in experiment["requests"]]
    if not requests:
        raise PerfAnalyzerError("perf_analyzer's export holds no request")
    origin = min(int(request["timestamp"]) for request in requests)
    found = []
    for request in requests:
        responses = tuple(sorted(int(stamp) - origin for stamp in request["response_timestamps"]))
        found.append(Timeline(int(request["timestamp"]) - origin, responses, bool(responses)))
    return sorted(found, key=lambda one: one.sent)


def find_perf_analyzer(home: Path = HOME) -> PerfAnalyzer:
    """The program to use: $PERF_ANALYZER, one on PATH, or one that is installed under `home` now or was before.

    Raises:
        PerfAnalyzerError: with what to do, if none runs and none can be installed.
    """
    if given := os.environ.get("PERF_ANALYZER"):
        chosen = PerfAnalyzer(Path(given))
        chosen.version()
        return chosen
    if (on_path := shutil.which("perf_analyzer")) and _runs(PerfAnalyzer(Path(on_path))):
        return PerfAnalyzer(Path(on_path))
    installed = _installed(home)
    if installed is None:
        _install(home)
        installed = _installed(home)
    if installed is None:
        raise PerfAnalyzerError(f"perf_analyzer: not in what was downloaded to {home}; set PERF_ANALYZER to a program that runs here")
    installed.version()
    return installed


def _runs(candidate: PerfAnalyzer) -> bool:
    try:
        candidate.version()
    except PerfAnalyzerError:  # the wheel's placeholder, or a program for another libc
        return False
    return True


def _installed(home: Path) -> PerfAnalyzer | None:
    binary = next((path for path in home.glob("**/bin/perf_analyzer") if path.is_file()), None)
    if binary is None:
        return None
    binary.chmod(0o755)
    libraries = {path.parent.resolve() for pattern in ("libcudart.so.12", "libb64.so.0d") for path in home.glob(f"**/{pattern}")}
    return PerfAnalyzer(binary.resolve(), tuple(sorted(libraries)))


def glibc() -> tuple[int, int]:
    """Version of this machine's C library; (0, 0) if it is another."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return (0, 0)
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _install(home: Path) -> None:
    """Download what this machine's C library needs into `home`; all of it or nothing."""
    if platform.machine() != "x86_64" or glibc() == (0, 0):
        raise PerfAnalyzerError(
            f"perf_analyzer: there is one for x86-64 Linux with glibc, none for {platform.machine()}; set PERF_ANALYZER to your own"
        )
    new = glibc() >= NEW_GLIBC
    beside = home.with_name(f"{home.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    wheels = NEW_WHEELS if new else OLD_WHEELS
    platforms = ("manylinux_2_38_x86_64",) if new else ("manylinux1_x86_64", "manylinux2014_x86_64")
    _run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(beside), *wheels]
        + [word for name in platforms for word in ("--platform", name)],
        f"download {' and '.join(wheels)} with pip",
    )
    for wheel in beside.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(beside)
        wheel.unlink()
    if not new and not _has_libb64():
        _run(["apt-get", "download", DEBIAN_PACKAGE], f"install Debian's {DEBIAN_PACKAGE} (or another's libb64)", beside)
        package = next(beside.glob("*.deb"))
        _run(["dpkg", "-x", str(package), str(beside)], f"unpack {package.name}")
        package.unlink()
    shutil.rmtree(home, ignore_errors=True)
    os.replace(beside, home)


def _has_libb64() -> bool:
    """Whether the system has the library that the old program wants."""
    try:
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return "libb64.so.0d" in listed


def _run(command: list[str], what: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError as error:
        raise PerfAnalyzerError(f"perf_analyzer: {what}, which did not work here ({error}); or set PERF_ANALYZER") from error
    if done.returncode:
        raise PerfAnalyzerError(f"perf_analyzer: {what}, which did not work here: {done.stderr.strip()[-300:]}; or set PERF_ANALYZER")
