"""Faults of what the server stands on: engine files damaged before and while it runs; no room left in /dev/shm."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serving.launcher.server import SHM_BYTES as MODEL_SHM_BYTES
from tests.stress.arena import MODELS, Arena, check_gauges, judge_good, reader_of, recover
from tests.stress.questions import Case, largest_case
from tests.stress.served import Served, StartError, private_shm_prefix
from tests.stress.tally import Tally, Verdict

SHM_BYTES = 64 << 20
TOO_SMALL_SHM_BYTES = 2 * MODEL_SHM_BYTES  # for fewer models than there are
MIB = 1 << 20
DAMAGED_STARTS = 12  # of all pairs of a file and a damage, drawn anew with every seed


def truncate(path: Path) -> None:
    """Leave the first half."""
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path: Path) -> None:
    """No file at all."""
    path.unlink()


def swap(path: Path) -> None:
    """The other reader's file of this name."""
    model = path.parent.parent
    reader, _, role = model.name.partition("_")
    other = {"fid": "fido", "fido": "fid"}[reader] + (f"_{role}" if role else "")
    shutil.copyfile(model.parent / other / path.parent.name / path.name, path)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip_a_bit, swap, remove)


def engine_files(repository: Path, reader: str) -> list[Path]:
    """Every engine file of a reader, its tokenizer and its manifests."""
    files = [path for model in (f"{reader}_encoder", reader) for path in sorted((repository / model / "1").iterdir())]
    return [path for path in files if path.is_file() and path.suffix != ".py"]


def damaged_at_start(arena: Arena, tally: Tally) -> None:
    """A reader with a damaged file must not start, must name the file, and must leave nothing behind."""
    repository = arena.scratch / "damaged"
    tries = [(path.relative_to(arena.repository), damage) for path in engine_files(arena.repository, "fid") for damage in DAMAGES]
    for path, damage in arena.rng.sample(tries, min(arena.many(DAMAGED_STARTS), len(tries))):
        shutil.rmtree(repository, ignore_errors=True)
        shutil.copytree(arena.repository, repository)
        before = (repository / path).read_bytes()
        damage(repository / path)
        if (repository / path).is_file() and (repository / path).read_bytes() == before:
            continue  # both readers share this file, so to swap it damages nothing
        served = Served(repository, arena.scratch, ["fid"], stream=False)
        what = f"{path} {damage.__name__}d"
        try:
            served.start()
        except StartError as error:
            # Triton's own table of models cuts messages short, so a manifest's own path may be all there is
            named = path.name in str(error) or ("manifest" in path.name and "engines of different checkpoints" in str(error))
            tally.judge(Verdict.TOLD if named else Verdict.WRONG, f"{what}: the refusal does not name it: {str(error)[-300:]}")
        else:
            tally.judge(Verdict.WRONG, f"{what}: served all the same")
        for left in served.stop():
            tally.leave(f"{what}: {left}")


def damaged_while_running(arena: Arena, tally: Tally) -> None:
    """Files truncated or swapped under a running server must not matter to it."""
    originals = arena.scratch / "originals"
    shutil.copytree(arena.repository, originals, dirs_exist_ok=True)
    try:
        for damage in (truncate, swap, remove):
            for reader in arena.cases:
                for path in engine_files(arena.repository, reader):
                    damage(path)
            for model in MODELS:
                for case in arena.cases[reader_of(model)]:
                    judge_good(tally, arena.asker.ask(case, model))
            shutil.copytree(originals, arena.repository, dirs_exist_ok=True)
    finally:
        shutil.copytree(originals, arena.repository, dirs_exist_ok=True)
        shutil.rmtree(originals)


def fill(directory: Path) -> list[Path]:
    """Take all the room that a file system has left, to the last page."""
    files = []
    for block in (MIB, os.sysconf("SC_PAGE_SIZE")):
        files.append(directory / f"filler-{block}")
        with files[-1].open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * block) == block:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return files


def full_shm(arena: Arena, tally: Tally) -> None:
    """No room left in a /dev/shm of the server's own: questions are answered right or told, and all is well soon after there is room."""
    if not private_shm_prefix():
        tally.unmeasured.append("`unshare --mount` is not allowed here, and the machine's own /dev/shm is not ours to fill")
        return
    for what in arena.stop():
        tally.leave(what)
    too_small = Served(arena.repository, arena.scratch, shm_bytes=TOO_SMALL_SHM_BYTES)
    try:
        too_small.start()
        tally.judge(Verdict.WRONG, f"started with {TOO_SMALL_SHM_BYTES >> 20} MiB of shared memory for {len(too_small.models)} models")
    except StartError as error:
        named = "shared memory" in str(error) or "/dev/shm" in str(error)
        tally.judge(Verdict.TOLD if named else Verdict.WRONG, f"the refusal to start does not name shared memory: {str(error)[-300:]}")
    for what in too_small.stop():
        tally.leave(f"start without room: {what}")
    arena.start(shm_bytes=SHM_BYTES)
    alive = arena.server.processes()
    fillers = fill(arena.server.shm)
    large = {reader: largest_case(cases[0], arena.limits[reader]) for reader, cases in arena.cases.items()}
    ask_large(arena, tally, large)
    for filler in fillers:
        filler.unlink()
    # a model's process of Triton 2.51 sometimes dies of it; then all are started again, as after kill -9
    if recover(arena, tally, time.monotonic()):
        for model in MODELS:
            for case in arena.cases[reader_of(model)]:
                judge_good(tally, arena.asker.ask(case, model))
        check_gauges(arena, tally)
    if any(alive.get(name) != pid for name, pid in arena.server.processes().items()):
        deaths = [line for line in arena.server.printed().splitlines() if "starting again" in line]
        tally.remarks.append(f"Triton died of it: {'; '.join(deaths)}")
    struck = time.monotonic()
    for what in arena.stop():
        tally.leave(what)
    tally.remarks.append(f"the shutdown after that took {time.monotonic() - struck:.0f} s")
    arena.start()


def ask_large(arena: Arena, tally: Tally, large: dict[str, Case]) -> None:
    """The largest questions that the limits allow, eight at a time, small ones among them. What a large one answers is not compared."""

    def ask(i: int) -> None:
        model = MODELS[i % len(MODELS)]
        small = i // len(MODELS) % 2 == 0
        case = arena.case(model) if small else large[reader_of(model)]
        verdict, what = arena.asker.ask(case, model, 120.0)
        tally.judge(Verdict.RIGHT if verdict is Verdict.WRONG and not small else verdict, f"{model}: {what}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(arena.many(64))))
