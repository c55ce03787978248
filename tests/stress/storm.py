"""`python -m tests.stress.storm`: clients leave by the thousand, on busy cores, and the server must not notice.

Clients of every kind in leaving.py leave, 16 and 64 at a time, while busy loops take every core and one more client asks questions that
must be answered right. It starts a server of its own on loopback, on a copy of the repository. Exit code 0 if no server died, no question
was lost or answered wrong, and no slot is held at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from serving.launcher.installation import PROJECT

from .__main__ import make_arena
from .arena import MODELS, Arena, ArenaError, reader_of, recover
from .leaving import PROBES, Target, kinds, run
from .questions import Case
from .served import GAUGES, _end_with_parent
from .tally import Tally, Verdict

LEFT = 20_000
AT_ONCE = (16, 64)
LOOPS_PER_CORE = 4
SPARE = 0.25  # more clients are started, since some are answered before they leave
BLOCK = 256  # clients of one kind in a row
QUESTIONS = 48  # that leaving clients ask
FULL_SHARE = 0.5  # of them with all their passages
PASSAGES = (1, 6)  # of the others
SHORT_SHARE, SHORT_TOKENS, LONG_TOKENS = 0.7, (2, 6), (8, 32)  # a short answer ends while the server still learns of the cancel
SLOTS_TIMEOUT_S = 20.0
WATCH_S = 0.25
SETTLING_S = 15.0  # after a server's death
COMPANY_PAUSE_S, COMPANY_TRIES = 0.1, 60


class BusyCores:
    """Processes that compute without end on every core."""

    def __init__(self, per_core: int):
        self._count = per_core * (os.cpu_count() or 1)
        self._loops: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> BusyCores:
        for _ in range(self._count):
            self._loops.append(subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=_end_with_parent))
        return self

    def __exit__(self, *_: object) -> None:
        for loop in self._loops:
            loop.kill()
            loop.wait()


class Watch:
    """Counts the deaths of tritonserver and of its models' processes, until closed."""

    def __init__(self, arena: Arena):
        self._arena, self.deaths = arena, 0
        self._known, self._settled_s = arena.server.processes(), 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Compare the processes with those known. The death of a server with all its models counts once."""
        found = self._arena.server.processes()
        died = [name for name, pid in self._known.items() if name in found and found[name] != pid]
        server_died = "tritonserver" in died or "serving" in died
        self.deaths += 1 if server_died else len(died)
        if server_died:
            self._settled_s = time.monotonic() + SETTLING_S
        # The models of a server that is starting again are new, and the old ones end meanwhile: neither counts.
        settled = time.monotonic() >= self._settled_s
        self._known = self._known | found if settled else {name: found[name] for name in ("serving", "tritonserver") if name in found}

    def close(self) -> int:
        """Stop; gives the number of deaths."""
        self._closing.set()
        self._thread.join()
        self.look()
        return self.deaths

    def _run(self) -> None:
        while not self._closing.wait(WATCH_S):
            self.look()


class Company:
    """A client that stays and asks one question after the other, until closed. A full queue is asked again; no other error is right."""

    def __init__(self, arena: Arena, seed: int):
        self._arena, self._rng = arena, random.Random(f"company {seed}")
        self.tally = Tally("company")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> Tally:
        """Stop; gives the verdicts."""
        self._closing.set()
        self._thread.join()
        return self.tally

    def _run(self) -> None:
        while not self._closing.wait(COMPANY_PAUSE_S):
            model = self._rng.choice(MODELS)
            self._ask(self._rng.choice(self._arena.cases[reader_of(model)]), model)

    def _ask(self, case: Case, model: str) -> None:
        for _ in range(COMPANY_TRIES):
            verdict, what = self._arena.asker.ask(case, model, timeout_s=120.0)
            if "no more may" not in what:
                break
            time.sleep(1.0)
        self.tally.judge(Verdict.LOST if verdict is Verdict.TOLD else verdict, f"{model}: {what}")


def questions(arena: Arena, seed: int) -> tuple[Case, ...]:
    """What leaving clients ask: the reference questions with other numbers of passages and tokens."""
    rng = random.Random(f"questions {seed}")
    drawn = []
    for _ in range(QUESTIONS):
        reader = rng.choice(list(arena.cases))
        case = rng.choice(arena.cases[reader])
        passages = len(case.passages) if rng.random() < FULL_SHARE else rng.randint(*PASSAGES)
        tokens = rng.randint(*(SHORT_TOKENS if rng.random() < SHORT_SHARE else LONG_TOKENS))
        tokens = min(tokens, arena.limits[reader].max_new_tokens)
        shorter = dataclasses.replace(case, passages=case.passages[:passages], titles=case.titles[:passages])
        drawn.append(shorter.lengthened(tokens))
    return tuple(drawn)


def blocks(chosen: Sequence[str], left: int, seed: int) -> list[tuple[str, int, int]]:
    """Kind, clients, and how many at once, in a random order; together `left` clients and some to spare, the kinds in equal shares."""
    pairs = [(kind, at_once) for kind in chosen for at_once in AT_ONCE]
    plan = []
    for kind, at_once in pairs:
        count = -(-round(left * (1 + SPARE)) // len(pairs))
        plan += [(kind, min(BLOCK, count - begin), at_once) for begin in range(0, count, BLOCK)]
    random.Random(f"blocks {seed}").shuffle(plan)
    return plan


def slots_held(arena: Arena, timeout_s: float = SLOTS_TIMEOUT_S) -> int:
    """Slots and places that are still taken when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        samples = arena.server.samples()
        held = sum(int(samples.get(name, {}).get(model, 0)) for name in GAUGES[:3] for model in MODELS)
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


@dataclasses.dataclass
class Result:
    """What a storm did: clients that left, by kind; deaths; questions lost or wrong; slots held at the end."""

    left: dict[str, int]
    deaths: int = 0
    lost: int = 0
    held: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.deaths or self.lost or self.held)

    def last_line(self) -> str:
        """The line that `make storm` ends with."""
        return f"storm: {sum(self.left.values())} left, {self.deaths} server deaths, {self.lost} lost, {self.held} slots still held"


def storm(arena: Arena, plan: Sequence[tuple[str, int, int]], wanted: int, seed: int, until_s: float) -> Result:
    """Run the blocks of a plan, one after the other, until all are done or the time is over.

    Where the plan is done before `wanted` clients have left, its blocks are run again: of some kinds many have their whole answer
    before they can leave, and these do not count.
    """
    result = Result({})
    target = Target(arena.server.grpc_url, arena.server.http_port, questions(arena, seed))
    watch, company = Watch(arena), Company(arena, seed)
    for index in itertools.count():
        kind, count, at_once = plan[index % len(plan)]
        if index >= len(plan) and sum(result.left.values()) >= wanted:
            break
        if time.monotonic() > until_s:
            print(f"the time is over: {index} blocks were run, the plan has {len(plan)}", flush=True)
            break
        started, deaths = time.monotonic(), watch.deaths
        left = run(kind, target, f"{seed} {index}", count, at_once)
        result.left[kind] = result.left.get(kind, 0) + left
        died = watch.deaths - deaths
        line = f"{time.strftime('%H:%M:%S')} {kind}, {at_once} at once: {left} of {count} left in {time.monotonic() - started:.1f} s"
        print(line + (f", {died} deaths" if died else ""), flush=True)
        if died or not left:  # the other blocks are for a server that runs
            recover(arena, Tally(kind), time.monotonic())
    tally = company.close()
    print(f"company: {tally.tries} questions, {tally.wrong} wrong, {tally.lost} lost", *tally.faults[:5], sep="\n  ")
    result.lost = tally.wrong + tally.lost
    after = Tally("afterwards")
    if not recover(arena, after, time.monotonic()) or after.wrong:
        print("the server does not answer right afterwards:", *after.faults, sep="\n  ")
        result.lost += 1
    result.deaths, result.held = watch.close(), slots_held(arena)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run a storm; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress.storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [kind for kind in kinds() if kind not in PROBES]
    parser.add_argument("--left", type=int, default=LEFT, metavar="N", help=f"clients that leave (default {LEFT})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=kinds(), default=everything, help=f"any of: {', '.join(kinds())}")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long, whatever is left (default 30)")
    parser.add_argument("--loops", type=int, default=LOOPS_PER_CORE, help=f"busy loops on each core (default {LOOPS_PER_CORE})")
    parser.add_argument("--repository", type=Path, default=PROJECT / "build" / "demo" / "model_repository")
    parser.add_argument("--words", action="store_true", help="the repository holds the tests' tiny readers, who know w0, w1, ...")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fido-storm-") as scratch:
        arena = make_arena(arguments.repository, Path(scratch), arguments.seed, 1.0, words=arguments.words)
        try:
            arena.start()
            arena.learn()
            plan = blocks(arguments.kinds, arguments.left, arguments.seed)
            with BusyCores(arguments.loops):
                result = storm(arena, plan, arguments.left, arguments.seed, started + arguments.minutes * 60)
        except ArenaError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            arena.stop()
    for kind, left in sorted(result.left.items()):
        print(f"{kind:<16} {left:6d} left")
    print(f"seed {arguments.seed}, {time.monotonic() - started:.0f} s")
    print(result.last_line())
    return 0 if result.sound and sum(result.left.values()) >= arguments.left else 1


if __name__ == "__main__":
    sys.exit(main())
