"""`python -m tests.stress.recovery`: what other clients notice when Triton dies with their questions in flight, and for how long.

Triton gets SIGSEGV, as from the race of cancelled streams, in three settings: clients without retries, clients with retries, and clients
with retries on two servers of which one dies. It prints when questions in flight failed, when the server answered again, how many questions
were lost, and how long the slowest took.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client import ReaderClient, ReaderError, ReaderUnavailable
from fido_client.data.examples import Example, read_examples
from serving.launcher.installation import PROJECT

from .served import Served, StartError

CLIENTS = 8
BEFORE_S, AFTER_S = 3.0, 25.0  # questions are asked from so long before the death to so long after it
RETRIES = 100


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One question: when it was asked and when it ended (time.monotonic), and the error, if any."""

    asked_s: float
    ended_s: float
    error: ReaderError | None


class Asking:
    """Clients that ask one question after the other, each with a connection of its own, until they are closed."""

    def __init__(self, url: str, reader: str, examples: Sequence[Example], retries: int):
        self.outcomes: list[Outcome] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, reader, examples[i::CLIENTS], retries)) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> list[Outcome]:
        """Let every client finish its question; all outcomes."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return sorted(self.outcomes, key=lambda outcome: outcome.ended_s)

    def _ask(self, url: str, reader: str, examples: Sequence[Example], retries: int) -> None:
        with ReaderClient(url, reader, timeout_s=60.0, retries=retries) as client:
            asked = 0
            while not self._stop.is_set():
                example = examples[asked % len(examples)]
                asked_s, error = time.monotonic(), None
                try:
                    client.answer(example.question, [c.text for c in example.contexts], [c.title or "" for c in example.contexts])
                except ReaderError as failure:
                    error = failure
                    self._stop.wait(0.05)
                self.outcomes.append(Outcome(asked_s, time.monotonic(), error))
                asked += 1


@dataclasses.dataclass(frozen=True)
class Row:
    """What clients noticed of one death; seconds from the death."""

    setting: str
    asked: int
    in_flight: int
    failed_s: tuple[float, float] | None
    other_errors: int
    lost: int
    answers_again_s: float
    slowest_s: float

    def __str__(self) -> str:
        failed = "none failed" if self.failed_s is None else f"failed after {self.failed_s[0] * 1e3:.0f} to {self.failed_s[1] * 1e3:.0f} ms"
        return (
            f"{self.setting}: {self.asked} asked, {self.in_flight} in flight at the death: {failed}; "
            f"{self.lost} lost, {self.other_errors} of them not UNAVAILABLE; next answer after {self.answers_again_s:.2f} s; "
            f"slowest {self.slowest_s:.1f} s"
        )


def summary(setting: str, outcomes: Sequence[Outcome], death_s: float) -> Row:
    """What the outcomes say about a death at `death_s`."""
    in_flight = [o for o in outcomes if o.asked_s <= death_s < o.ended_s]
    failed = [o.ended_s - death_s for o in in_flight if o.error]
    errors = [o for o in outcomes if o.error]
    return Row(
        setting,
        asked=len(outcomes),
        in_flight=len(in_flight),
        failed_s=(min(failed), max(failed)) if failed else None,
        other_errors=sum(not isinstance(o.error, ReaderUnavailable) for o in errors),
        lost=len(errors),
        answers_again_s=min((o.ended_s - death_s for o in outcomes if o.ended_s > death_s and not o.error), default=float("inf")),
        slowest_s=max(o.ended_s - o.asked_s for o in outcomes),
    )


def killed(pid: int) -> float:
    """Send SIGSEGV; the time.monotonic at which the process was gone. Triton first writes its stack, and serves on meanwhile."""
    os.kill(pid, signal.SIGSEGV)
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                break
        except OSError:
            break
        time.sleep(0.001)
    return time.monotonic()


def measure(setting: str, servers: int, retries: int, repository: Path, reader: str, examples: Sequence[Example]) -> Row:
    """Kill one of so many servers under load.

    Raises:
        StartError: if a server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="fido-recovery-") as scratch:
        serving = [Served(repository, Path(scratch), [reader], stream=False) for _ in range(servers)]
        try:
            for server in serving:
                server.start()
            asking = Asking(",".join(server.grpc_url for server in serving), reader, examples, retries)
            time.sleep(BEFORE_S)
            death_s = killed(serving[0].processes()["tritonserver"])
            time.sleep(AFTER_S)
            return summary(setting, asking.close(), death_s)
        finally:
            for server in serving:
                server.stop()


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if a client with retries lost a question."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=PROJECT / "build" / "demo" / "model_repository")
    parser.add_argument("--reader", default="fid")
    parser.add_argument("--data", type=Path, default=PROJECT / "build" / "corpus" / "heldout.jsonl")
    arguments = parser.parse_args(argv)
    examples = list(read_examples(arguments.data, limit=200))
    rows = []
    try:
        for setting, servers, retries in (("no retries", 1, 0), ("retries", 1, RETRIES), ("retries, one of two servers dies", 2, RETRIES)):
            rows.append(measure(setting, servers, retries, arguments.repository, arguments.reader, examples))
            print(rows[-1], flush=True)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if any(row.lost for row in rows[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
