"""`python -m tests.stress`: do to a running server what clients, operators and machines do to servers, and count what goes wrong.

One pass over all faults takes under 10 minutes on two cores; with --minutes above that the rest of the time is a soak: the faults that
clients commit, again and again, on one server whose memory must stay flat. Loopback only, on a copy of the repository; ends nothing that
it has not started. Exit code 0 if nothing was wrong, lost, crashed or left behind, and everything was measured.

Not sent: the gRPC header `triton_grpc_error`. Every stream that it ends with an error may kill Triton 2.51, and no option forbids it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from examples.demo import REPOSITORY
from serving.launcher.installation import PROJECT
from tests.stress.faults import clients as client_faults
from tests.stress.faults import files as file_faults
from tests.stress.faults import processes as process_faults

from .arena import Arena, ArenaError, run_fault
from .questions import READERS, corpus_cases, keep_encoder_states, limits_of, word_cases
from .tally import Tally, growths, last_line, notes, table

PASS_MINUTES = 10.0
# Of a soak's time. glibc keeps what the largest burst so far has taken, and the largest is not in the first round.
WARM_UP_SHARE = 1 / 2
# Allocators and Triton's shared memory pool keep their high-water mark, that of the largest crowd so far; crowds of equal size go on
# setting new marks by chance. So the warm-up's are larger than those that are measured.
WARM_UP_SCALE = 1.5
TRIMMED_S = 6.0  # after a burst, its heap has been given back (serving/launcher/preload/heap_trim.c)
CASES = 6  # of each reader
LONG_TOKENS = 96  # of the long ones
# FiDO keeps encoder states, of about as many passages as two questions have, so that they also go; FiD keeps none.
CACHE_BYTES = 3 << 20
CORPUS = PROJECT / "build/corpus/heldout.jsonl"

Fault = Callable[[Arena, Tally], None]
CLIENT_FAULTS: dict[str, Fault] = {
    "malformed gRPC": client_faults.malformed_grpc,
    "malformed HTTP": client_faults.malformed_http,
    "cancel storm": client_faults.cancel_storm,
    "cancel storm, streams": client_faults.cancel_storm_streams,
    "beams, choices, cancels": client_faults.mixed_kinds,
    "deadlines too short": client_faults.deadlines_too_short,
    "slow readers": client_faults.slow_readers,
    "hanging up": client_faults.hanging_up,
    "overload": client_faults.overload,
}
# after which Triton's memory is not what it was: no part of a soak
LEAKING_FAULTS: dict[str, Fault] = {"dropped at their error": client_faults.dropped_at_their_error}
# what may end processes, or starts servers of its own
OTHER_FAULTS: dict[str, Fault] = {
    "fatal to Triton 2.51": process_faults.fatal_requests,
    **process_faults.KILLS,
    "kill -9 all models": process_faults.kill_all_models,
    "kill -9 tritonserver": process_faults.kill_tritonserver,
    "kill -9 launcher": process_faults.kill_launcher,
    "kill -9 everything": process_faults.kill_all,
    "shutdown under load": process_faults.shutdown_under_load,
    "full /dev/shm": file_faults.full_shm,
    "files damaged, running": file_faults.damaged_while_running,
    "files damaged, start": file_faults.damaged_at_start,
}
FAULTS = CLIENT_FAULTS | LEAKING_FAULTS | OTHER_FAULTS


def make_arena(repository: Path, scratch: Path, seed: int, scale: float, *, words: bool) -> Arena:
    """An arena on a copy of the repository, with reference questions but no server yet."""
    copy = scratch / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("__pycache__"))
    keep_encoder_states(copy, "fido", CACHE_BYTES)
    limits = {reader: limits_of(copy, reader) for reader in READERS}
    cases = {}
    for reader, bounds in limits.items():
        short = word_cases(reader, bounds, seed, CASES) if words else corpus_cases(reader, bounds, seed, CASES, CORPUS)
        cases[reader] = [*short, short[0].shortened(), short[0].lengthened(min(LONG_TOKENS, bounds.max_new_tokens))]
    return Arena(copy, scratch, limits, cases, random.Random(seed), scale)


def run_pass(arena: Arena, names: list[str], tallies: dict[str, Tally]) -> None:
    """Every named fault once; what it counted is added to its row."""
    for name in names:
        started = time.monotonic()
        tally = run_fault(arena, name, FAULTS[name], harmless=name not in OTHER_FAULTS)
        tallies.setdefault(name, Tally(name)).absorb(tally)
        verdict = "" if tally.sound else "  <- see below"
        print(f"{time.strftime('%H:%M:%S')} {name}: {tally.tries} tries in {time.monotonic() - started:.1f} s{verdict}", flush=True)


def _memory(arena: Arena, tally: Tally) -> dict[str, int]:
    """Bytes of every process and of /dev/shm at rest, printed as well: how they got where they are is half of the answer.

    A reader's caches are as large as its last questions needed, so all have the same last one, and a short one.
    """
    client_faults.short_question(arena, tally)
    time.sleep(TRIMMED_S)
    found = {**arena.server.memory(), "/dev/shm": arena.server.shm_bytes()}
    print(time.strftime("%H:%M:%S"), "memory in MB:", ", ".join(f"{name} {size / 1e6:.1f}" for name, size in found.items()), flush=True)
    return found


def soak(arena: Arena, tallies: dict[str, Tally], until_s: float) -> list[str]:
    """Rounds of the clients' faults on one server until the time is over; gives the report, and counts growth as left behind."""
    tally = tallies.setdefault("soak", Tally("soak"))
    for what in arena.stop():
        tally.leave(what)
    arena.start()
    warm_s = time.monotonic() + WARM_UP_SHARE * (until_s - time.monotonic())
    warm_up = 0
    ordinary, arena.scale = arena.scale, arena.scale * WARM_UP_SCALE
    while warm_up == 0 or time.monotonic() < warm_s:
        run_pass(arena, list(CLIENT_FAULTS), tallies)
        warm_up += 1
        _memory(arena, tally)
    arena.scale = ordinary

    samples, processes = [_memory(arena, tally)], arena.server.processes()
    while time.monotonic() < until_s:
        run_pass(arena, list(CLIENT_FAULTS), tallies)
        samples.append(_memory(arena, tally))
    if arena.server.processes() != processes:
        return ["memory     not comparable: a process has been replaced"]
    found = growths(samples)
    for growth in found:
        if not growth.is_flat:
            tally.leave(str(growth))
    rounds = f"{len(samples) - 1} rounds after {warm_up} of warm-up"
    return [f"memory over {rounds}, medians of the first and of the last third:", *map(str, found)]


def main(argv: list[str] | None = None) -> int:
    """Run the faults, print the table; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.stress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("STRESS_MINUTES") or PASS_MINUTES), help="default 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FAULT", choices=list(FAULTS), help=f"any of: {', '.join(FAULTS)}")
    parser.add_argument("--soak-only", action="store_true", help="no pass over all faults before a soak")
    parser.add_argument("--repository", type=Path, default=PROJECT / REPOSITORY)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tries")
    parser.add_argument("--words", action="store_true", help="the repository holds the tests' tiny readers, who know w0, w1, ...")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    tallies: dict[str, Tally] = {}
    report: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fido-stress-") as scratch:
        arena = make_arena(arguments.repository, Path(scratch), arguments.seed, arguments.scale, words=arguments.words)
        try:
            arena.start()
            arena.learn()
            if not arguments.soak_only:
                run_pass(arena, arguments.only or list(FAULTS), tallies)
            if arguments.minutes > PASS_MINUTES and not arguments.only:
                report = soak(arena, tallies, started + arguments.minutes * 60)
            end = Tally("shutdown")
            for what in arena.stop():
                end.leave(what)
            if not end.sound:
                tallies["shutdown"] = end
        except ArenaError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            arena.stop()
    rows = list(tallies.values())
    print("", table(rows), "", *report, *notes(rows), f"seed {arguments.seed}, {time.monotonic() - started:.0f} s", sep="\n")
    print(last_line(rows))
    return 0 if all(row.sound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
