"""Faults of processes: kill -9 of each, a shutdown under load, requests that kill Triton. Every request under way must be told."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.stress.arena import MODELS, Arena, reader_of, recover
from tests.stress.asking import TIMEOUT_S, Outcome, exchange
from tests.stress.mutants.http import infer_body, nested, request
from tests.stress.questions import Case
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


# Requests that kill Triton 2.51 itself, before any of our code sees them: whether it comes back, and whether all others are told.
#
# Found by the mutants, which leave them out since. Nothing in a model or an option of Triton 2.51 can refuse them; `python -m serving` can
# only start it again. Whoever can reach the ports can send them, hence loopback by default.

# Within the size of the largest good request that the default limits allow: 40 passages of 50,000 characters
LEVELS = 900_000
CHUNKS = 1_000_000
OTHERS_IN_FLIGHT = 8
DEATH_S = 1.0  # writing its stack to the log takes Triton a while


def nested_lists(case: Case) -> tuple[str, bytes, dict[str, str] | None]:
    """JSON is parsed by recursion: 8 MB of stack hold about 40,000 levels."""
    return "generate", f'{{"question": {nested(LEVELS)}}}'.encode(), None


def nested_objects(case: Case) -> tuple[str, bytes, dict[str, str] | None]:
    """The same with objects."""
    return "generate", nested(LEVELS // 3, '{"a":', "}").encode(), None


def many_chunks(case: Case) -> tuple[str, bytes, dict[str, str] | None]:
    """Triton lists the pieces of a body on its stack."""
    whole = json.dumps(case.body() | {"padding": "x" * CHUNKS}).encode()
    content = b"".join(b"1\r\n%c\r\n" % byte for byte in whole) + b"0\r\n\r\n"
    return "generate", content, {"Content-Length": "", "Transfer-Encoding": "chunked"}


def huge_shape(case: Case) -> tuple[str, bytes, dict[str, str] | None]:
    """Memory for a tensor is taken before its data is looked at."""
    body = infer_body(case)
    next(entry for entry in body["inputs"] if entry["datatype"] == "INT32")["shape"] = [2**40]
    return "infer", json.dumps(body).encode(), None


def classified_text(case: Case) -> tuple[str, bytes, dict[str, str] | None]:
    """The classification extension, asked of an output that is text."""
    body = infer_body(case) | {"outputs": [{"name": "answer", "parameters": {"classification": 1}}]}
    return "infer", json.dumps(body).encode(), None


HTTP: tuple[Callable[[Case], tuple[str, bytes, dict[str, str] | None]], ...] = (
    nested_lists,
    nested_objects,
    many_chunks,
    huge_shape,
    classified_text,
)


def classified(message: Any) -> bytes:
    """The same over gRPC, for which one number in an otherwise good request is enough."""
    message.outputs.add(name="answer").parameters["classification"].int64_param = 1
    return bytes(message.SerializeToString())


def fatal_requests(arena: Arena, tally: Tally) -> None:
    """Each of them once, good requests being under way."""

    def over_http(make: Callable[[Case], tuple[str, bytes, dict[str, str] | None]]) -> None:
        endpoint, body, headers = make(arena.cases["fid"][0])
        exchange(arena.server.http_port, request(f"/v2/models/fid/{endpoint}", body, headers))

    attempts: dict[str, Callable[[], object]] = {make.__name__.replace("_", " "): lambda make=make: over_http(make) for make in HTTP}  # type: ignore[misc]
    for model in MODELS[:2]:
        content = classified(arena.cases["fid"][0].message(model))
        attempts[f"classified text, gRPC, {model}"] = lambda c=content, m=model: arena.asker.send_raw(c, m)  # type: ignore[misc]
    deadly = []
    for what, attempt in attempts.items():
        arena.strike()
        before = arena.server.processes()
        load = Load(arena, OTHERS_IN_FLIGHT)
        try:
            attempt()
            tally.judge(Verdict.TOLD)
        except TimeoutError as error:
            tally.judge(Verdict.LOST, f"{what}: {error}")
        except OSError:
            tally.judge(Verdict.TOLD)
        struck = time.monotonic()
        while (
            died := arena.server.processes().get("tritonserver") != before["tritonserver"]
        ) is False and time.monotonic() < struck + DEATH_S:
            time.sleep(0.05)
        if died:
            deadly.append(what)
        well = recover(arena, tally, struck)
        load.judge(tally)
        if not well:
            arena.stop()
            arena.start()
    if deadly:
        tally.remarks.append(f"killed Triton: {', '.join(deadly)}")
