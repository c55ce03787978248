"""NVIDIA's perf_analyzer: found or installed for this machine, and run for one load point, with the server's counts.

In: a model, a file of requests, a load. Out: the time of each request and of each of its responses, from perf_analyzer's
profile export. Nothing is averaged here.

The wheel `perf-analyzer` needs glibc 2.38; below that pip installs a placeholder without a program. This module then uses the
program in the wheel `tritonclient` 2.51, with the two libraries that it needs.
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

from serving.launcher.endpoints import fetch
from serving.launcher.server import TritonServer
from serving.launcher.statistics import statistics_of

HOME = Path("build/perf_analyzer")
NEW_GLIBC = (2, 38)
NEW_WHEELS = ("perf-analyzer==2.60.0",)
OLD_WHEELS = ("tritonclient==2.51.0", "nvidia-cuda-runtime-cu12==12.3.101")
DEBIAN_PACKAGE = "libb64-0d"
# perf_analyzer finds no window of mixed lengths stable; without this it stops and writes nothing.
ANY_STABILITY = "999"


class PerfAnalyzerError(RuntimeError):
    """perf_analyzer is not available here, or it failed."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One request, in nanoseconds from the start of the first one.

    Attributes:
        sent: time of the request.
        responses: time of each response; a unary model sends one.
        ok: whether it was answered.
    """

    sent: int
    responses: tuple[int, ...]
    ok: bool = True


@dataclasses.dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer program and its libraries."""

    binary: Path
    libraries: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """The environment of its process, with its libraries first."""
        paths = [*map(str, self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return os.environ | ({"LD_LIBRARY_PATH": os.pathsep.join(paths)} if paths else {})

    def version(self) -> str:
        """Its version line.

        Raises:
            PerfAnalyzerError: it does not run.
        """
        try:
            done = subprocess.run([str(self.binary), "--version"], capture_output=True, text=True, env=self.environment(), timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PerfAnalyzerError(f"{self.binary} does not run: {error}") from error
        output = (done.stdout + done.stderr).strip()
        if done.returncode or "erf" not in output:
            raise PerfAnalyzerError(f"{self.binary} does not run: {output[-300:]}")
        return next(line for line in output.splitlines() if "erf" in line).strip()

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
            load: its arguments, such as ("--concurrency-range", "4").
            requests: number of requests.
            csv: file for perf_analyzer's report.
            timeout_s: seconds after which it is stopped.

        Returns:
            All requests, in the order of sending.

        Raises:
            PerfAnalyzerError: it fails or writes no export; the message ends with its last output.
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
                raise PerfAnalyzerError(f"{model}, {' '.join(load)}: not finished after {timeout_s:.0f} s; send fewer requests") from error
            if not export.exists():
                tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
                raise PerfAnalyzerError(f"{model}, {' '.join(load)}: perf_analyzer ended with {done.returncode} and no export:\n{tail}")
            # the export repeats the inputs, with numbers as raw bytes, which are not UTF-8
            return timelines(json.loads(export.read_bytes().decode("utf-8", errors="replace"), strict=False))


def timelines(export: dict[str, Any]) -> list[Timeline]:
    """The requests of a profile export, in the order of sending."""
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
    """The program to use: $PERF_ANALYZER, else one on PATH, else one under `home`, where it is installed if missing.

    Raises:
        PerfAnalyzerError: none runs and none can be installed; the message says what to do.
    """
    if named := os.environ.get("PERF_ANALYZER"):
        chosen = PerfAnalyzer(Path(named))
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
    except PerfAnalyzerError:  # the wheel's placeholder, or a program for another C library
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
    """The version of this machine's glibc; (0, 0) for another C library."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return (0, 0)
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _install(home: Path) -> None:
    """Download the program for this machine's C library into `home`, completely or not at all."""
    if platform.machine() != "x86_64" or glibc() == (0, 0):
        raise PerfAnalyzerError(
            f"perf_analyzer: there is one for x86-64 Linux with glibc, none for {platform.machine()}; set PERF_ANALYZER to your own"
        )
    new = glibc() >= NEW_GLIBC
    partial = home.with_name(f"{home.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    wheels = NEW_WHEELS if new else OLD_WHEELS
    platforms = ("manylinux_2_38_x86_64",) if new else ("manylinux1_x86_64", "manylinux2014_x86_64")
    _run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(partial), *wheels]
        + [word for name in platforms for word in ("--platform", name)],
        f"download {' and '.join(wheels)} with pip",
    )
    for wheel in partial.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        wheel.unlink()
    if not new and not _has_libb64():
        _run(["apt-get", "download", DEBIAN_PACKAGE], f"install Debian's {DEBIAN_PACKAGE} (or another's libb64)", partial)
        package = next(partial.glob("*.deb"))
        _run(["dpkg", "-x", str(package), str(partial)], f"unpack {package.name}")
        package.unlink()
    shutil.rmtree(home, ignore_errors=True)
    os.replace(partial, home)


def _has_libb64() -> bool:
    """Whether the system has libb64, which the old program needs."""
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


def main() -> int:
    """`python -m perf.served.perf_analyzer ...`: perf_analyzer itself with these arguments, found or installed; returns its exit code."""
    try:
        program = find_perf_analyzer()
    except PerfAnalyzerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return subprocess.run([str(program.binary), *sys.argv[1:]], env=program.environment(), check=False).returncode


# The server's counts during a load point: differences of Triton's statistics and of the readers' metrics.

TIMEOUT_S = 10.0
# The readers' counters (serving/triton/metrics.py) that a load point reports.
COUNTERS = (
    "encoder_engine_seconds_total",
    "encoder_passages_total",
    "encoder_tokens_total",
    "reader_generated_tokens_total",
    "reader_steps_total",
    "reader_step_seconds_total",
)
GPU_GAUGES = ("nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_power_usage")
Counts = dict[str, float]


def counts_of(server: TritonServer) -> Counts:
    """All counts now, by model and name."""
    found: Counts = {}
    for model in server.models:
        stats = statistics_of(server, model)
        found[f"{model} executions"] = float(stats.executions)
        found[f"{model} requests"] = float(stats.requests)
        found[f"{model} queue_s"] = stats.queue_s
        found[f"{model} compute_infer_s"] = stats.compute_s
    lines = fetch(server.metrics_url, TIMEOUT_S).decode().splitlines()
    for line in lines:
        name, _, rest = line.partition("{")
        if name in COUNTERS:
            labels, _, value = rest.rpartition("} ")
            found[f"{labels.partition('model=')[2].split(',')[0].strip(chr(34))} {name}"] = float(value)
        elif name in GPU_GAUGES:
            found[name] = float(rest.rpartition(" ")[2])
    return found


def difference(earlier: Counts, later: Counts, reader: str) -> dict[str, Any]:
    """Counts of one reader's models between two readings; GPU gauges as of the later one."""
    models = (reader, f"{reader}_encoder", f"{reader}_stream")
    found = {
        name: round(value - earlier.get(name, 0.0), 6)
        for name, value in later.items()
        if name.partition(" ")[0] in models and value != earlier.get(name, 0.0)
    }
    return found | {name: later[name] for name in GPU_GAUGES if name in later}


if __name__ == "__main__":
    sys.exit(main())
