"""`python -m perf.served.scaling --gpus 0,1`: questions/s of one GPU and of all the named ones, in one run, by perf_analyzer.

One server a GPU, as `make serve GPUS=` starts them, and one perf_analyzer a server. Three settings take turns in every round: one server
with all cores, one server with the share of cores that it has beside the others, and all servers at once. Writes summary.json: the medians,
and every round. The second setting says what the cores cost; what is missing beyond it is what the servers take from each other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from examples.demo import ENGINES
from export.repository import repository_from_engines
from perf.bounds.machine import describe
from serving.contract.limits import Limits
from serving.contract.manifest import TOKENIZER_FILE, Manifest
from serving.launcher.fleet import Place, places_of
from serving.launcher.server import TritonServer, models_of

from .perf_analyzer import PerfAnalyzer, find_perf_analyzer
from .sweep import LIMIT_NAMES, summary_of
from .workload import RequestMaker, WorkloadSpec, exactly, write_input_data

SYNTHETIC_REQUESTS = 64
TIMEOUT_S = 400.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the summary, print it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m perf.served.scaling", description=__doc__)
    parser.add_argument("--gpus", help="numbers by commas, or all; without it --replicas servers on the CPU")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--engines", type=Path, default=ENGINES, help="folder with the reader's engines (default: the demo's)")
    parser.add_argument("--reader", default="fido")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=96, help="questions in flight at each server")
    parser.add_argument("--turns", type=int, default=12, help="answers of each place in flight")
    parser.add_argument("--rounds", type=int, default=2)
    for name in LIMIT_NAMES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Limits(), name), help="the servers' limit of this name"
        )
    parser.add_argument("--out", type=Path, default=Path("perf/results/h200x2/summary.json"))
    arguments = parser.parse_args(argv)

    places = places_of(arguments.gpus, arguments.replicas)
    alone = dataclasses.replace(places[0], cores=tuple(sorted(os.sched_getaffinity(0))))
    settings = {"one": [alone], "one_with_its_share_of_cores": [places[0]], "all": places}
    program, rounds = find_perf_analyzer(), []
    with tempfile.TemporaryDirectory() as folder:
        repository, requests = Path(folder, "repository"), Path(folder, "requests.json")
        limits = Limits(**{name: getattr(arguments, name) for name in LIMIT_NAMES})
        repository_from_engines(arguments.engines / arguments.reader, repository, arguments.reader, limits)
        manifest = Manifest.load(arguments.engines / arguments.reader)
        maker = RequestMaker(Tokenizer.from_file(str(arguments.engines / arguments.reader / TOKENIZER_FILE)), manifest)
        passage_tokens = exactly(manifest.prompt.passage_length)
        spec = WorkloadSpec(exactly(arguments.passages), passage_tokens, new_tokens=exactly(arguments.new_tokens))
        write_input_data(maker.make(spec, SYNTHETIC_REQUESTS, 0), requests)
        for number in range(arguments.rounds):
            found = {}
            for name, chosen in settings.items() if number % 2 == 0 else reversed(settings.items()):
                with _served(chosen, repository, arguments.reader) as servers:
                    found[name] = _rates(program, servers, requests, arguments)
                print(f"round {number + 1}  {name}: {' + '.join(f'{rate:.2f}' for rate in found[name])} questions/s", flush=True)
            rounds.append(found)
    summary = summary_from(rounds, len(places)) | {
        "machine": describe(),
        "places": [{"place": place.name, "cores": len(place.cores)} for place in places],
        "reader": arguments.reader,
        "engine": f"{manifest.engine} {manifest.precision}",
        "workload": str(spec),
        "concurrency_at_each_server": arguments.concurrency,
        "limits": {name: getattr(arguments, name) for name in LIMIT_NAMES},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"scaling: {summary['scaling']:.2f} over {len(places)} servers; {arguments.out}")
    return 0


def summary_from(rounds: Sequence[dict[str, list[float]]], count: int) -> dict[str, Any]:
    """The medians over the rounds, and how many times one server's questions/s all servers together have.

    Args:
        rounds: setting -> questions/s of each of its servers.
        count: of servers together; with two the figures' names are `one_gpu_...` and `two_gpu_...`.
    """
    one, share, together = (
        statistics.median(sum(found[name]) for found in rounds) for name in ("one", "one_with_its_share_of_cores", "all")
    )
    words = {2: "two_gpu", 4: "four_gpu", 8: "eight_gpu"}.get(count, "all_gpus")
    return {
        "one_gpu_questions_per_s": round(one, 3),
        "one_gpu_with_its_share_of_cores_questions_per_s": round(share, 3),
        f"{words}_questions_per_s": round(together, 3),
        "scaling": round(together / one, 3),
        "rounds": list(rounds),
    }


@contextlib.contextmanager
def _served(places: Sequence[Place], repository: Path, reader: str) -> Iterator[list[TritonServer]]:
    """A server in each place."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_server(place, repository, reader)) for place in places]


@contextlib.contextmanager
def _server(place: Place, repository: Path, reader: str) -> Iterator[TritonServer]:
    before = os.sched_getaffinity(0)
    server = TritonServer(models_of([reader], stream=False), repository, start_timeout_s=TIMEOUT_S, variables=place.variables)
    os.sched_setaffinity(0, place.cores)  # what this thread starts has these cores
    try:
        server.__enter__()
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield server
    finally:
        server.stop()


def _rates(program: PerfAnalyzer, servers: Sequence[TritonServer], requests: Path, arguments: argparse.Namespace) -> list[float]:
    """Questions/s of each server, all loaded at the same time."""
    concurrency = arguments.concurrency

    def rate(server: TritonServer) -> float:
        count = concurrency * (arguments.turns + 2)
        load = ["--concurrency-range", str(concurrency)]
        sent = program.measure(
            arguments.reader,
            server.grpc_url,
            requests,
            load,
            count,
            streaming=False,
            csv=requests.with_name(f"{server.grpc_port}.csv"),
            timeout_s=TIMEOUT_S,
        )
        summary = summary_of(sent, (concurrency, concurrency), arguments.new_tokens)
        if summary["errors"]:
            raise RuntimeError(f"{summary['errors']} of {len(sent)} questions failed")
        return float(summary["questions_per_s"])

    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(rate, servers))


if __name__ == "__main__":
    sys.exit(main())
