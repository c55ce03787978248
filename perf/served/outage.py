"""`python -m perf.served.outage`: kills tritonserver under questions in flight; how soon clients know, and when they have answers again.

One server, then one of two, each without and with retries. Prints a table and writes nothing. "Known" is from the kill to the error of a
question in flight there. "Answered" is from the kill to the answer of such a question, sent again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.demo import REPOSITORY
from fido_client.errors import ReaderError
from fido_client.reader_client import ReaderClient
from serving.launcher.endpoints import free_ports
from serving.launcher.server import TritonServer, models_of
from serving.launcher.supervisor import keep_serving

QUESTION, PASSAGES = "what is the capital of France?", ["Its capital is Paris. " * 12] * 20
START_S, TIMEOUT_S = 300.0, 120.0


@dataclasses.dataclass
class Kept:
    """A server that is started again when it dies."""

    starts: list[TritonServer] = dataclasses.field(default_factory=list)
    ready_s: list[float] = dataclasses.field(default_factory=list)

    def announce(self, server: TritonServer) -> None:
        """Note a start."""
        self.starts.append(server)
        self.ready_s.append(time.perf_counter())


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question; times are of time.perf_counter()."""

    sent_s: float
    ended_s: float
    error: ReaderError | None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m perf.served.outage", description=__doc__)
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="model repository (default: the demo's)")
    parser.add_argument("--reader", default="fido")
    parser.add_argument("--in-flight", type=int, default=8, help="questions at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="kills of each kind (default: %(default)s)")
    arguments = parser.parse_args(argv)
    print("| servers | retries | in flight at the kill | failed | known, ms: median, most | answered, s: median, most | server ready, s |")
    print("|---|---|---|---|---|---|---|")
    for count in (1, 2):
        for retries in (0, 50):
            with contextlib.redirect_stdout(sys.stderr):  # what the launcher says
                row = measured(arguments.repository, arguments.reader, count, retries, arguments.in_flight, arguments.rounds)
            print(row, flush=True)
    return 0


def measured(repository: Path, reader: str, count: int, retries: int, in_flight: int, rounds: int) -> str:
    """One row of the table."""
    stop, kept = threading.Event(), [Kept() for _ in range(count)]
    keepers, urls = [], []
    for each in kept:
        http, grpc, metrics = free_ports(3)
        urls.append(f"127.0.0.1:{grpc}")

        def new_server(ports: tuple[int, int, int] = (http, grpc, metrics)) -> TritonServer:
            return TritonServer(models_of([reader], stream=False), repository, ports, start_timeout_s=START_S)

        keepers.append(threading.Thread(target=keep_serving, args=(new_server, stop, each.announce)))
        keepers[-1].start()
    known_s: list[float] = []
    answered_s: list[float] = []
    ready_s: list[float] = []
    try:
        for number in range(rounds):
            _wait_for(kept, number + 1)
            killed_s, ready_after_s, asked = _strike(kept, urls, reader, retries, in_flight)
            ready_s.append(ready_after_s)
            for one in asked:
                if one.sent_s < killed_s < one.ended_s:
                    (answered_s if one.error is None else known_s).append(one.ended_s - killed_s)
    finally:
        stop.set()
        for keeper in keepers:
            keeper.join()
    cells = [
        str(count),
        "yes" if retries else "no",
        str(len(known_s) + len(answered_s)),
        str(len(known_s)),
        _middle_and_most([seconds * 1e3 for seconds in known_s], 0),
        _middle_and_most(answered_s, 1),
        _middle_and_most(ready_s, 1),
    ]
    return f"| {' | '.join(cells)} |"


def _wait_for(kept: Sequence[Kept], starts_of_first: int) -> None:
    deadline_s = time.monotonic() + START_S
    while len(kept[0].starts) < starts_of_first or not all(each.starts for each in kept):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no server within {START_S:g} s")
        time.sleep(0.05)


def _strike(kept: Sequence[Kept], urls: list[str], reader: str, retries: int, in_flight: int) -> tuple[float, float, list[Asked]]:
    """Kill the first server under load; when, how many seconds until it was ready again, and every question."""
    asked: list[Asked] = []
    over = threading.Event()
    with ReaderClient(urls, reader, TIMEOUT_S, retries=retries) as client, ThreadPoolExecutor(in_flight) as pool:

        def ask() -> None:
            while not over.is_set():
                sent_s, error = time.perf_counter(), None
                try:
                    client.answer(QUESTION, PASSAGES, min_new_tokens=32, max_new_tokens=32)
                except ReaderError as raised:
                    error = raised
                asked.append(Asked(sent_s, time.perf_counter(), error))
                if error is not None:
                    time.sleep(0.05)

        for _ in range(in_flight):
            pool.submit(ask)
        time.sleep(3)
        process, starts = kept[0].starts[-1].process, len(kept[0].starts)
        assert process is not None
        killed_s = time.perf_counter()
        os.kill(process.pid, signal.SIGSEGV)
        _wait_for(kept, starts + 1)
        time.sleep(2)
        over.set()
    return killed_s, kept[0].ready_s[-1] - killed_s, asked


def _middle_and_most(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}, {max(values):.{digits}f}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
