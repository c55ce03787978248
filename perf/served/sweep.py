"""`python -m perf.served.sweep`: perf_analyzer over concurrency and request rate, FiD and FiDO in turn, unary and streaming.

Each load point is a process with a fixed number of requests, so an unstable point does not affect others. The readers alternate at every
point, and the first one changes from round to round: a ratio compares two consecutive runs. Writes sweep.json, and under raw/ for every
point perf_analyzer's CSV and the times of every request and response. With --variant fp8, for the same readers in FP8 on the same machine,
the file is sweep_fp8.json and the folder raw/fp8/.

Not counted: start-up, the first requests of a point (as many as are in flight, and four at least), and the last ones, as the load declines.
A point is unstable if the rate of a third of it differs from the whole by more than UNSTABLE; it is marked and kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from examples.demo import ENGINES
from export.repository import repository_from_engines
from fido_client.data.examples import read_examples
from fido_client.metrics import percentile
from serving.contract.limits import Limits
from serving.contract.manifest import TOKENIZER_FILE, Manifest
from serving.launcher.server import TritonServer, models_of

from .perf_analyzer import PerfAnalyzer, PerfAnalyzerError, Timeline, counts_of, difference, find_perf_analyzer
from .workload import PLANS, VARIANTS, Mode, RequestMaker, Series, requests_from, write_input_data

READERS = ("fid", "fido")
LIMIT_NAMES = ("slots", "kv_cache_bytes", "max_passages", "encoder_batch", "encoder_instances", "reader_instances", "encode_threads")
UNSTABLE = 0.15
MIN_SKIPPED = 4
SYNTHETIC_REQUESTS = 64  # distinct ones, which perf_analyzer repeats
POINT_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Point:
    """One load point of one reader."""

    reader: str
    series: Series
    mode: Mode
    load: float
    streaming: bool
    round: int

    @property
    def model(self) -> str:
        """The model's name in Triton."""
        return f"{self.reader}_stream" if self.streaming else self.reader

    @property
    def name(self) -> str:
        """The base name of its files."""
        kind = "c" if self.mode == "concurrency" else "r"
        return f"{self.model}-{self.series.workload}-{kind}{self.load:g}-round{self.round}"

    @property
    def skipped(self) -> tuple[int, int]:
        """Number of requests that are not counted at the start and at the end."""
        in_flight = int(self.load) if self.mode == "concurrency" else MIN_SKIPPED
        return max(in_flight, MIN_SKIPPED), in_flight

    @property
    def requests(self) -> int:
        """Number of requests that are sent."""
        measured = self.series.requests if self.mode == "concurrency" else self.series.requests // 2
        if self.mode == "concurrency" and self.load == 1:
            measured = min(measured, self.series.alone)
        elif self.mode == "concurrency":
            measured = max(measured, self.series.turns * int(self.load))
        return measured + sum(self.skipped)

    def arguments(self, scratch: Path) -> list[str]:
        """perf_analyzer's arguments; a request rate writes a file of intervals into `scratch`."""
        if self.mode == "concurrency":
            return ["--concurrency-range", f"{int(self.load)}"]
        # perf_analyzer's own Poisson process repeats a dozen gaps, whose mean is wrong at low rates
        times = scratch / "intervals.txt"
        times.write_text("".join(f"{gap}\n" for gap in poisson_gaps_us(self.load, self.requests, self.round)), encoding="utf-8")
        return ["--request-intervals", str(times)]


def poisson_gaps_us(rate: float, count: int, seed: int) -> list[int]:
    """Microseconds between requests of a Poisson process, scaled to the exact mean of the rate."""
    numbers = random.Random(seed)
    gaps = [numbers.expovariate(1.0) for _ in range(count)]
    scale = count / sum(gaps) * 1e6 / rate
    return [max(round(gap * scale), 1) for gap in gaps]


def points_of(plan: Sequence[Series], rounds: int) -> list[Point]:
    """All points in the order of measurement: every round has every load, every load both readers."""
    return [
        Point(reader, series, mode, load, streaming, number)
        for number in range(rounds)
        for series in plan
        for mode, load, streaming in series.points()
        for reader in (READERS if number % 2 == 0 else READERS[::-1])
    ]


def summary_of(requests: Sequence[Timeline], skip: tuple[int, int], new_tokens: int | None) -> dict[str, Any]:
    """What a point's requests say: rates over the counted part, latencies in ms, and whether the point was stable.

    Args:
        requests: all of the point.
        skip: how many answers are left out at the start and at the end, in the order in which they were whole.
        new_tokens: of every answer, where that is known: for times between tokens.

    Raises:
        PerfAnalyzerError: if nothing was answered.
    """
    answered = sorted((request for request in requests if request.ok), key=lambda request: request.responses[-1])
    if not answered:
        raise PerfAnalyzerError("not one request was answered")
    first, last = skip
    counted = answered[first : len(answered) - last]
    if len(counted) < 3:  # too few for leaving any out; such a point is never stable
        counted, first = answered, 0
    before = answered[first - 1].responses[-1] if first else min(request.sent for request in counted)
    span_s = (counted[-1].responses[-1] - before) / 1e9
    rate = len(counted) / span_s
    latencies = [(request.responses[-1] - request.sent) / 1e6 for request in counted]
    waits = [(request.responses[0] - request.sent) / 1e6 for request in counted]
    found: dict[str, Any] = {
        "questions_per_s": round(rate, 3),
        "tokens_per_s": None if new_tokens is None else round(rate * new_tokens, 1),
        "latency_ms": _percentiles(latencies, 50, 90, 95, 99) | {"avg": round(sum(latencies) / len(latencies), 3)},
        "ttft_ms": None,
        "inter_token_ms": None,
        "requests": len(counted),
        "errors": len(requests) - len(answered),
        "stable": len(counted) < len(answered) and _is_stable(counted, before, rate),
    }
    if any(len(request.responses) > 1 for request in counted):
        found["ttft_ms"] = _percentiles(waits, 50, 99)
        if new_tokens is not None and new_tokens > 1:
            gaps = [(request.responses[-1] - request.responses[0]) / 1e6 / (new_tokens - 1) for request in counted]
            found["inter_token_ms"] = _percentiles(gaps, 50, 99)
    return found


def _percentiles(values: Sequence[float], *percents: int) -> dict[str, float]:
    return {f"p{percent}": round(percentile(values, percent), 3) for percent in percents}


def _is_stable(counted: Sequence[Timeline], before: int, rate: float) -> bool:
    """Whether each third of the answers came at about the rate of all."""
    third, start = len(counted) // 3, before
    for i in range(3):
        part = counted[i * third : (i + 1) * third if i < 2 else len(counted)]
        end = part[-1].responses[-1]
        if end <= start or abs(len(part) / ((end - start) / 1e9) / rate - 1) > UNSTABLE:
            return False
        start = end
    return True


class Sweep:
    """Measures points on a running server and keeps their raw files."""

    def __init__(self, program: PerfAnalyzer, server: TritonServer, inputs: dict[tuple[str, str], Path], run: Path, raw: Path):
        self._program, self._server, self._inputs, self._run, self._raw = program, server, inputs, run, raw
        (run / raw).mkdir(parents=True, exist_ok=True)

    def measure(self, point: Point) -> dict[str, Any]:
        """One entry of sweep.json."""
        series = point.series
        raw = self._raw / f"{point.name}.json"
        new_tokens = series.spec.new_tokens.high if series.spec and series.spec.new_tokens.low == series.spec.new_tokens.high else None
        entry: dict[str, Any] = {
            "reader": point.reader,
            "model": point.model,
            "workload": series.workload,
            "mode": point.mode,
            "load": point.load,
            "round": point.round,
            "new_tokens": new_tokens,
            "passages": series.spec.passages.high if series.spec else None,
            "passage_tokens": series.spec.passage_tokens.high if series.spec else None,
        }
        earlier = counts_of(self._server)
        requests = self._program.measure(
            point.model,
            self._server.grpc_url,
            self._inputs[point.reader, series.workload],
            point.arguments(self._inputs[point.reader, series.workload].parent),
            point.requests,
            streaming=point.streaming,
            csv=(self._run / raw).with_suffix(".csv"),
            timeout_s=POINT_TIMEOUT_S,
        )
        entry["sent_per_s"] = round((len(requests) - 1) / (requests[-1].sent / 1e9), 3) if len(requests) > 1 else None
        times = [[request.sent, list(request.responses)] for request in requests]
        (self._run / raw).write_text(json.dumps({"sent_and_response_ns": times}, separators=(",", ":")) + "\n", encoding="utf-8")
        server = difference(earlier, counts_of(self._server), point.reader)
        return entry | summary_of(requests, point.skipped, new_tokens) | {"server": server, "raw": str(raw)}


def write_inputs(plan: Sequence[Series], engines: Path, data: Path, seed: int, folder: Path) -> dict[tuple[str, str], Path]:
    """perf_analyzer's input data of every reader and workload: the same requests for both readers if their tokenizers agree."""
    written = {}
    for reader in READERS:
        manifest = Manifest.load(engines / reader)
        maker = RequestMaker(Tokenizer.from_file(str(engines / reader / TOKENIZER_FILE)), manifest)
        for series in plan:
            path = folder / f"{reader}-{series.workload}.json"
            if series.spec is None:
                write_input_data(requests_from(read_examples(data, limit=400)), path)
            else:
                write_input_data(maker.make(series.spec, SYNTHETIC_REQUESTS, seed), path)
            written[reader, series.workload] = path
    return written


def run_sweep(plan: Sequence[Series], arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve both readers and measure every point of the plan; a failed point is reported and skipped."""
    program = find_perf_analyzer()
    limits = Limits(**{name: getattr(arguments, name) for name in LIMIT_NAMES})
    points = points_of(plan, arguments.rounds)
    entries: list[dict[str, Any]] = []
    failures: list[str] = []
    settings = {
        "workloads": {series.workload: f"{series.spec or 'questions of the data file'}, seed {arguments.seed}" for series in plan},
        "rounds": arguments.rounds,
        "perf_analyzer": program.version(),
        "limits": dataclasses.asdict(limits),
        "excluded": __doc__.partition("Not counted: ")[2].partition(".")[0].replace("\n", " ") if __doc__ else "",
        "failures": failures,
    }
    result = {"settings": settings, "points": entries}
    streams = any(series.streaming for series in plan)
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch, "repository")
        for reader in READERS:
            repository_from_engines(arguments.engines / reader, repository, reader, limits)
        inputs = write_inputs(plan, arguments.engines, arguments.data, arguments.seed, Path(scratch))
        with TritonServer(models_of(READERS, stream=streams), repository, log=arguments.log) as server:
            sweep = Sweep(program, server, inputs, arguments.run, Path("raw", arguments.variant or ""))
            for number, point in enumerate(points, 1):
                try:
                    entry = sweep.measure(point)
                except PerfAnalyzerError as error:
                    failures.append(f"{point.name}: {error}")
                    print(f"{number:3} of {len(points)}  {failures[-1]}", file=sys.stderr, flush=True)
                    continue
                entries.append(entry)
                # after every point, so that an interrupted run keeps its results
                sweep_file(arguments).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                mark = "" if entry["stable"] else "  unstable"
                print(
                    f"{number:3} of {len(points)}  {point.name}: {entry['questions_per_s']:.2f} questions/s, "
                    f"p50 {entry['latency_ms']['p50']:.1f} ms{mark}",
                    flush=True,
                )
    return result


def sweep_file(arguments: argparse.Namespace) -> Path:
    """Where the points go."""
    return arguments.run / f"sweep{'_' + arguments.variant if arguments.variant else ''}.json"


def size_fault(engines: Path) -> str:
    """Why the two readers are no fair comparison; empty if they are one: FiDO's encoder is that of the FiD it is compared with."""
    manifests = {reader: Manifest.load(engines / reader) for reader in READERS}
    widths = {reader: manifest.sizes.d_model_encoder for reader, manifest in manifests.items()}
    lengths = {reader: manifest.prompt.passage_length for reader, manifest in manifests.items()}
    described = ", ".join(
        f"{reader}: {manifest.provenance.get('source', '?')}, encoder width {widths[reader]}, passage length {lengths[reader]}"
        for reader, manifest in manifests.items()
    )
    same = len(set(widths.values())) == len(set(lengths.values())) == 1
    return "" if same else f"readers: wanted encoders of one size, got {described}; --different-sizes compares them all the same"


def main(argv: list[str] | None = None) -> int:
    """Measure a plan; return exit code 1 if a point failed or had errors."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.served.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=list(PLANS), default="cpu")
    parser.add_argument("--engines", type=Path, default=ENGINES, help="folder with the engines of fid and fido")
    parser.add_argument("--data", type=Path, default=Path("build/corpus/heldout.jsonl"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    for name in LIMIT_NAMES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Limits(), name), help="the server's limit of this name"
        )
    parser.add_argument("--log", type=Path, default=Path("build/perf-tritonserver.log"))
    parser.add_argument("--run", type=Path, default=Path("build/perf"), help="folder for the results")
    parser.add_argument("--variant", choices=VARIANTS, help="a second run of the same folder: the same readers in this precision")
    parser.add_argument("--different-sizes", action="store_true", help="compare the readers though their encoders differ in size")
    arguments = parser.parse_args(argv)
    if not arguments.different_sizes and (fault := size_fault(arguments.engines)):
        print(f"error: {fault}", file=sys.stderr)
        return 1
    lengths = {Manifest.load(arguments.engines / reader).prompt.passage_length for reader in READERS}
    result = run_sweep(PLANS[arguments.plan](min(lengths)), arguments)
    sweep_file(arguments).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{sweep_file(arguments)}: {len(result['points'])} points")
    return 1 if result["settings"]["failures"] or any(entry["errors"] for entry in result["points"]) else 0


if __name__ == "__main__":
    sys.exit(main())
