"""Faults of processes: kill -9 of every one there is, and a shutdown under load. Every request under way must be told."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable

from tests.stress.arena import MODELS, Arena, reader_of, recover
from tests.stress.asking import TIMEOUT_S, Outcome
from tests.stress.tally import Tally, Verdict

from .clients import long_case

IN_FLIGHT = 24
KILLS_OF_ONE = 2
GONE_TIMEOUT_S = 45.0  # Triton lets requests under way end for up to 30 s


class Load:
    """Long questions to every model, all sent at once, each waited for in a thread of its own."""

    def __init__(self, arena: Arena, count: int):
        self.outcomes: list[Outcome] = []
        self._threads = [threading.Thread(target=self._ask, args=(arena, MODELS[i % len(MODELS)]), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, arena: Arena, model: str) -> None:
        verdict, what = arena.asker.ask(long_case(arena, model), model)
        self.outcomes.append((verdict, f"{model}: {what}"))

    def judge(self, tally: Tally) -> None:
        """Wait until every question is answered, told or lost, and count them."""
        deadline = time.monotonic() + TIMEOUT_S + 10
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for outcome in self.outcomes:
            tally.judge(*outcome)
        for _ in range(len(self._threads) - len(self.outcomes)):
            tally.judge(Verdict.LOST, "the client itself hangs")


def kill_model(arena: Arena, tally: Tally, model: str) -> None:
    """kill -9 of one model's process, idle and under load."""
    _kill(arena, tally, lambda processes: [processes[model]])


def kill_tritonserver(arena: Arena, tally: Tally) -> None:
    """kill -9 of Triton itself."""
    _kill(arena, tally, lambda processes: [processes["tritonserver"]])


def kill_all_models(arena: Arena, tally: Tally) -> None:
    """kill -9 of every model's process at once."""
    _kill(arena, tally, lambda processes: [pid for name, pid in processes.items() if name not in ("serving", "tritonserver")])


def _kill(arena: Arena, tally: Tally, victims: Callable[[dict[str, int]], list[int]]) -> None:
    for i in range(arena.many(KILLS_OF_ONE)):
        arena.strike()
        load = Load(arena, IN_FLIGHT if i % 2 == 0 else 0)
        time.sleep(arena.rng.random() * 0.05)
        processes = arena.server.processes()
        struck = time.monotonic()
        try:
            for pid in victims(processes):
                os.kill(pid, signal.SIGKILL)
        except KeyError as error:
            tally.crash(f"there is no process of {error}")
            return
        well = recover(arena, tally, struck)
        load.judge(tally)
        tally.judge(Verdict.TOLD)
        if not well:
            return
        if still := [pid for name, pid in arena.server.processes().items() if name != "serving" and pid in victims(processes)]:
            tally.crash(f"processes {still} are still there after kill -9")


def kill_launcher(arena: Arena, tally: Tally) -> None:
    """kill -9 of `python -m serving`: Triton must go with it, and leave nothing behind."""
    load = Load(arena, IN_FLIGHT)
    time.sleep(0.02)
    arena.server.signal(signal.SIGKILL)
    arena.server.wait()
    load.judge(tally)
    _start_again(arena, tally, arena.server.sweep(GONE_TIMEOUT_S))


def kill_all(arena: Arena, tally: Tally) -> None:
    """kill -9 of `python -m serving`, Triton and every model at once: nobody is left to clean up but the next start."""
    load = Load(arena, IN_FLIGHT)
    time.sleep(0.02)
    processes = arena.server.processes()
    for pid in processes.values():
        os.kill(pid, signal.SIGKILL)
    arena.server.wait()
    load.judge(tally)
    regions = arena.server.regions_of_machine()
    tally.remarks.append(f"kill -9 of everything leaves {len(regions)} shared memory regions; the next start has to remove them")
    previous = arena.server
    arena.disconnect()
    struck = time.monotonic()
    arena.start()
    well = recover(arena, tally, struck)
    if well and (stale := [region for region in regions if region in previous.regions_of_machine()]):
        tally.leave(f"{len(stale)} shared memory regions of the killed server, after another start", len(stale))
    previous.sweep()
    tally.judge(Verdict.TOLD)


def shutdown_under_load(arena: Arena, tally: Tally) -> None:
    """SIGTERM with requests under way: each is answered right or told, and nothing is left behind."""
    for _ in range(arena.many(2)):
        load = Load(arena, IN_FLIGHT)
        time.sleep(arena.rng.random() * 0.05)
        struck = time.monotonic()
        arena.server.signal(signal.SIGTERM)
        code = arena.server.wait()
        load.judge(tally)
        tally.remarks.append(f"shutdown took {time.monotonic() - struck:.0f} s at most") if time.monotonic() - struck > 10 else None
        if code != 0:
            tally.crash(f"`python -m serving` ended with code {code}")
        _start_again(arena, tally, arena.server.sweep())


def _start_again(arena: Arena, tally: Tally, left: list[str]) -> None:
    for what in left:
        tally.leave(what)
    tally.judge(Verdict.TOLD)
    arena.disconnect()
    struck = time.monotonic()
    arena.start()
    recover(arena, tally, struck)


KILLS = {
    f"kill -9 {model}": functools.partial(kill_model, model=model)
    for r in map(reader_of, MODELS[::2])
    for model in (r, f"{r}_encoder", f"{r}_stream")
}
