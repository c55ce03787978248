"""Where faults happen: a server, reference questions with their answers, and the checks that follow every fault."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client.reader_client import ReaderClient, ReaderError
from serving.contract.limits import Limits

from .asking import Asker, Outcome, ask_http
from .questions import READERS, Case
from .served import GAUGES, Served, StartError
from .tally import Tally, Verdict

MODELS = tuple(f"{reader}{suffix}" for reader in READERS for suffix in ("", "_stream"))
RECOVERY_TIMEOUT_S = 60.0
GAUGES_TIMEOUT_S = 5.0
REASONABLE = 5.0  # seconds that one reference question may take on a server that is well

STRIKES_A_LAUNCHER = 3


class ArenaError(RuntimeError):
    """The suite cannot go on: no server starts, or it does not answer as it should before any fault."""


@dataclasses.dataclass
class Arena:
    """What a fault works with.

    Attributes:
        repository: a copy of our own, so that its files may be damaged.
        scratch: a folder for logs.
        limits: of each reader.
        cases: reference questions of each reader.
        rng: every random choice is made with it.
        scale: 1 tries every fault as often as `make stress` does.
    """

    repository: Path
    scratch: Path
    limits: dict[str, Limits]
    cases: dict[str, list[Case]]
    rng: random.Random
    scale: float = 1.0
    served: Served | None = None
    _asker: Asker | None = None
    _strikes: int = 0

    @property
    def server(self) -> Served:
        """The running server."""
        assert self.served is not None
        return self.served

    @property
    def asker(self) -> Asker:
        """A connection to it."""
        assert self._asker is not None
        return self._asker

    def many(self, count: int) -> int:
        """How often to try, given how often at full scale."""
        return max(1, round(count * self.scale))

    def case(self, model: str) -> Case:
        """A random reference question for a model."""
        return self.rng.choice(self.cases[reader_of(model)])

    def start(self, shm_bytes: int | None = None) -> None:
        """Start a server and connect.

        Raises:
            ArenaError: if none starts.
        """
        served = Served(self.repository, self.scratch, shm_bytes=shm_bytes)
        try:
            self.served = served.start()
        except StartError as error:
            served.stop()
            raise ArenaError(f"the server does not start: {error}") from error
        self._strikes = 0
        self._asker = Asker(served.grpc_url, served.http_port)

    def stop(self) -> list[str]:
        """Stop the server; gives what it has left behind."""
        self.disconnect()
        left = self.served.stop() if self.served is not None else []
        self.served = None
        return left

    def strike(self) -> None:
        """To be called before anything deadly: a launcher pauses longer with every death, so it is a new one every few of them."""
        if self._strikes >= STRIKES_A_LAUNCHER:
            self.stop()
            self.start()
        self._strikes += 1

    def disconnect(self) -> None:
        """Close the connection to the server."""
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    def learn(self) -> None:
        """Take the answers of the undisturbed server for right, if its models agree with themselves and each other.

        Raises:
            ArenaError: if they do not.
        """
        for reader, cases in self.cases.items():
            for case in cases:
                from_server(self, case, reader)
                for model in (reader, f"{reader}_stream"):
                    verdict, what = self.asker.ask(case, model)
                    if verdict is not Verdict.RIGHT:
                        raise ArenaError(f"{model} answers {case.question!r} differently from {reader}, on an undisturbed server: {what}")


def reader_of(model: str) -> str:
    """The reader that a model serves."""
    return model.removesuffix("_stream")


def from_server(arena: Arena, case: Case, reader: str) -> None:
    """Fill in what the server answers.

    Raises:
        ArenaError: if it does not.
    """
    options = {"max_new_tokens": case.max_new_tokens, "min_new_tokens": case.min_new_tokens, **case.search}
    try:
        with ReaderClient(arena.server.grpc_url, reader) as client:
            answer = client.answer(case.question, case.passages, case.titles, **options)
    except ReaderError as error:
        raise ArenaError(f"an undisturbed server does not answer: {error}") from error
    case.text, case.tokens, case.log_prob, case.answers = answer.text, answer.tokens, answer.log_prob, answer.answers


def judge_good(tally: Tally, outcome: Outcome) -> None:
    """Judge a good question that nothing stands in the way of: being told that there is no answer is wrong too."""
    verdict, what = outcome
    if verdict is Verdict.TOLD:
        tally.judge(Verdict.WRONG, f"a good question got no answer: {what}")
    else:
        tally.judge(verdict, what)


@contextlib.contextmanager
def good_company(arena: Arena, tally: Tally, backoff_s: float = 0.02) -> Iterator[None]:
    """Meanwhile, good questions to every model, over gRPC and HTTP in turn; each must be answered right."""
    over = threading.Event()
    rng = random.Random(arena.rng.random())

    def ask() -> None:
        n = 0
        while not over.wait(backoff_s):
            model = MODELS[n % len(MODELS)]
            case = rng.choice(arena.cases[reader_of(model)])
            judge_good(tally, ask_http(arena.server.http_port, case, model) if n % 8 > 3 else arena.asker.ask(case, model))
            n += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def recover(arena: Arena, tally: Tally, since_s: float) -> bool:
    """Ask every model until it answers right, and note how long after `since_s` that was; False if it does not happen."""
    deadline = since_s + RECOVERY_TIMEOUT_S
    what = "not asked"
    for model in MODELS:
        case = arena.cases[reader_of(model)][0]
        while True:
            verdict, what = arena.asker.ask(case, model, REASONABLE)
            if verdict is Verdict.RIGHT:
                break
            if verdict is Verdict.WRONG:
                tally.judge(verdict, f"{model}, after the fault: {what}")
            if not arena.server.is_running():
                tally.crash(f"`python -m serving` ended: {arena.server.printed().splitlines()[-1:]}")
                return False
            if time.monotonic() > deadline:
                tally.crash(f"{model} does not answer {RECOVERY_TIMEOUT_S:.0f} s after the fault: {what}")
                return False
            time.sleep(0.02)
    tally.recovered(time.monotonic() - since_s)
    return True


def check_gauges(arena: Arena, tally: Tally) -> None:
    """Slots, queue and memory must be given back."""
    deadline = time.monotonic() + GAUGES_TIMEOUT_S
    while True:
        try:
            samples = arena.server.samples()
        except OSError as error:
            if time.monotonic() > deadline:
                tally.leave(f"the metrics cannot be read: {error}")
                return
            time.sleep(0.05)
            continue
        if missing := [name for name in GAUGES if not set(MODELS) <= set(samples.get(name, {}))]:
            tally.unmeasured.append(f"{', '.join(missing)}: not among the server's metrics")
            return
        held = {f"{name} of {model}": samples[name][model] for name in GAUGES for model in MODELS if samples[name][model]}
        if not held:
            return
        if time.monotonic() > deadline:
            tally.leave(", ".join(f"{name} = {value:g}" for name, value in held.items()), len(held))
            return
        time.sleep(0.05)


def run_fault(arena: Arena, name: str, fault: Callable[[Arena, Tally], None], *, harmless: bool) -> Tally:
    """Do it to a healthy server, then check that all is as before.

    Args:
        arena: with a running server; with one afterwards too.
        name: of the fault.
        fault: counts its tries.
        harmless: no process may die of it.
    """
    tally = Tally(name)
    before, regions = arena.server.processes(), arena.server.regions()
    fault(arena, tally)
    well = recover(arena, tally, time.monotonic()) if tally.recovery_s is None and not tally.crashed else not tally.crashed
    if well:
        check_gauges(arena, tally)
    after = arena.server.processes()
    if harmless and well:
        for process in [process for process, pid in before.items() if after.get(process) != pid]:
            tally.crash(f"the process of {process} died")
            well = False
    if well and (surplus := len(arena.server.regions()) - len(regions)) > 0:
        tally.leave(f"{surplus} shared memory regions more than before", surplus)
    if not well:
        for what in arena.stop():
            tally.remarks.append(f"after the crash there was left: {what}")
        arena.start()
    return tally
