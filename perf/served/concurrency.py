"""`python -m perf.served.concurrency`: throughput and latency through Triton over concurrency, with and without in-flight batching.

One asyncio client runs a closed loop over gRPC: the number of questions in flight is constant, and a window ends after a number of answers.
Every round alternates between readers, concurrencies and settings (all slots, one slot); a row is the median of the rounds. Excluded:
start-up, model load, and the first questions of each window. Writes perf/results/cpu/load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.demo import ENGINES, REPOSITORY
from export.repository import repository_from_engines
from fido_client.async_reader_client import AsyncReaderClient
from fido_client.data.examples import Example, read_examples
from fido_client.metrics import percentile
from perf.bounds.machine import describe
from serving.contract.limits import Limits
from serving.launcher.server import TritonServer, models_of

READERS = ("fid", "fido")
CONCURRENCIES = (1, 4, 16, 64)
RESULT = Path("perf/results/cpu/load.json")
MIN_SHARE_OF_PEAK = 0.95  # throughput at the highest concurrency, as a share of the best
MAX_OF_IDEAL = 3.0  # p99 at the highest concurrency, as a multiple of concurrency / throughput
ONE_SLOT_CONCURRENCIES = (16,)  # one slot is saturated at any concurrency


@dataclasses.dataclass(frozen=True)
class Window:
    """One measurement: seconds of each question, and of the window."""

    latencies_s: tuple[float, ...]
    wall_s: float

    @property
    def questions_per_s(self) -> float:
        """Throughput."""
        return len(self.latencies_s) / self.wall_s


@dataclasses.dataclass(frozen=True)
class Row:
    """Median of the windows at one concurrency."""

    concurrency: int
    questions_per_s: float
    questions_per_s_min_max: tuple[float, float]
    p50_s: float
    p99_s: float

    @property
    def p99_over_ideal(self) -> float:
        """p99 as a multiple of concurrency / throughput, the latency of every question under first-in-first-out service."""
        return self.p99_s * self.questions_per_s / self.concurrency

    def as_json(self) -> dict[str, Any]:
        """The row in JSON, times in milliseconds."""
        return {
            "questions_per_s": round(self.questions_per_s, 1),
            "questions_per_s_min_max": [round(rate, 1) for rate in self.questions_per_s_min_max],
            "p50_ms": round(self.p50_s * 1e3, 2),
            "p99_ms": round(self.p99_s * 1e3, 2),
            "p99_over_ideal": round(self.p99_over_ideal, 2),
        }


def row_from_windows(concurrency: int, windows: Sequence[Window]) -> Row:
    """Summarize the windows of one concurrency."""
    rates = [window.questions_per_s for window in windows]
    p50, p99 = (statistics.median(percentile(window.latencies_s, percent) for window in windows) for percent in (50, 99))
    return Row(concurrency, statistics.median(rates), (min(rates), max(rates)), p50, p99)


def checks(rows: Sequence[Row]) -> dict[str, Any]:
    """What must hold of a reader's rows, in order of concurrency: no collapse under load, no question starved."""
    last, peak = rows[-1], max(row.questions_per_s for row in rows)
    share = last.questions_per_s / peak
    return {
        "throughput_share_of_peak": round(share, 3),
        "throughput_holds": share >= MIN_SHARE_OF_PEAK,
        "p99_over_ideal": round(last.p99_over_ideal, 2),
        "p99_holds": last.p99_over_ideal <= MAX_OF_IDEAL,
    }


async def window_of(client: AsyncReaderClient, examples: Iterator[Example], concurrency: int, questions: int, warmup: int) -> Window:
    """Keep `concurrency` questions in flight until `questions` have been answered after the first `warmup`.

    So many are in flight to the end of the window; what is answered after it, while the last callers finish, is not counted.
    """
    latencies: list[float] = []
    started = ended = 0.0
    finished = 0

    async def caller() -> None:
        nonlocal finished, started, ended
        while finished < warmup + questions:
            example = next(examples)
            latency_s = (await client.answer(example.question, [context.as_passage() for context in example.contexts])).latency_s
            finished += 1
            if finished == warmup:
                started = time.perf_counter()
            elif warmup < finished <= warmup + questions:
                latencies.append(latency_s)
                ended = time.perf_counter()

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return Window(tuple(latencies), ended - started)


def measure_window(url: str, reader: str, examples: Iterator[Example], concurrency: int, questions: int) -> Window:
    """One turn on a connection of its own; as many questions as are in flight warm it up, and four at least."""

    async def run() -> Window:
        async with AsyncReaderClient(url, reader, 600.0) as client:
            return await window_of(client, examples, concurrency, questions, max(concurrency, 4))

    return asyncio.run(run())


@contextlib.contextmanager
def servers(engines: Path, scratch: Path, readers: Sequence[str]) -> Iterator[dict[str, TritonServer]]:
    """Two servers: the model repository, and the same readers with one slot."""
    for reader in readers:
        repository_from_engines(engines / reader, scratch, reader, Limits(slots=1))
    models = models_of(readers, stream=False)
    with TritonServer(models, REPOSITORY) as in_flight, TritonServer(models, scratch) as one_slot:
        yield {"in_flight": in_flight, "one_slot": one_slot}


def measure(
    readers: Sequence[str], examples: Sequence[Example], rounds: int, questions: int, engines: Path
) -> dict[str, dict[str, list[Row]]]:
    """Setting -> reader -> one row for each concurrency."""
    windows: dict[tuple[str, str, int], list[Window]] = {}
    concurrencies = {"in_flight": CONCURRENCIES, "one_slot": ONE_SLOT_CONCURRENCIES}
    with tempfile.TemporaryDirectory() as scratch, servers(engines, Path(scratch), readers) as running:
        for _ in range(rounds):
            for setting, server in running.items():
                for concurrency in concurrencies[setting]:
                    for reader in readers:
                        source = itertools.cycle(examples)
                        window = measure_window(server.grpc_url, reader, source, concurrency, questions)
                        windows.setdefault((setting, reader, concurrency), []).append(window)
    return {
        setting: {reader: [row_from_windows(c, windows[setting, reader, c]) for c in concurrencies[setting]] for reader in readers}
        for setting in concurrencies
    }


def main() -> int:
    """Measure, print and write the result; return exit code 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m perf.served.concurrency", description=__doc__)
    parser.add_argument("--questions", type=int, default=300, help="answers in each window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readers", nargs="+", default=list(READERS))
    parser.add_argument("--engines", type=Path, default=ENGINES)
    parser.add_argument("--data", type=Path, default=Path("build/corpus/heldout.jsonl"))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    examples = list(read_examples(arguments.data, limit=500))
    measured = measure(arguments.readers, examples, arguments.rounds, arguments.questions, arguments.engines)
    result: dict[str, Any] = {
        "machine": describe(),
        "excluded": "start-up, model load, the first questions of each window (as many as are in flight, and 4 at least)",
        "questions_a_window": arguments.questions,
        "rounds": arguments.rounds,
        "slots": Limits().slots,
    }
    holds = True
    for reader in arguments.readers:
        rows, (one_slot,) = measured["in_flight"][reader], measured["one_slot"][reader]
        found = checks(rows)
        holds = holds and found["throughput_holds"] and found["p99_holds"]
        (same_load,) = (row for row in rows if row.concurrency == one_slot.concurrency)
        worth = round(same_load.questions_per_s / one_slot.questions_per_s, 2)
        result[reader] = {
            "in_flight": {str(row.concurrency): row.as_json() for row in rows},
            "one_question_at_a_time": {str(one_slot.concurrency): one_slot.as_json()},
            "worth_of_in_flight_batching": worth,
            "checks": found,
        }
        for label, row in [*(("in flight", row) for row in rows), ("one slot", one_slot)]:
            figures = f"{row.questions_per_s:7.1f} questions/s, p50 {row.p50_s * 1e3:7.1f} ms, p99 {row.p99_s * 1e3:7.1f} ms"
            print(f"{reader:5} {label:9} at {row.concurrency:2}: {figures}, p99 {row.p99_over_ideal:.2f} x ideal")
        share, ideal, most = found["throughput_share_of_peak"], found["p99_over_ideal"], rows[-1].concurrency
        print(f"{reader:5} throughput at {most}: {share:.0%} of its peak (wanted {MIN_SHARE_OF_PEAK:.0%})")
        print(f"{reader:5} p99 at {most}: {ideal:.2f} x ideal (wanted at most {MAX_OF_IDEAL:.0f})")
        print(f"{reader:5} in-flight batching: {worth:.2f} times the throughput of one question at a time")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
