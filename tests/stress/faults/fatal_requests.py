"""Requests that kill Triton 2.51 itself, before any of our code sees them: whether it comes back, and whether all others are told.

Found by the mutants, which leave them out since. Nothing in a model or an option of Triton 2.51 can refuse them; `python -m serving` can
only start it again. Whoever can reach the ports can send them, hence loopback by default.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from tests.stress.arena import MODELS, Arena, recover
from tests.stress.asking import exchange
from tests.stress.mutants.http import infer_body, nested, request
from tests.stress.questions import Case
from tests.stress.tally import Tally, Verdict

from .processes import Load

# Within the size of the largest good request that the default limits allow: 40 passages of 50,000 characters
LEVELS = 900_000
CHUNKS = 1_000_000
IN_FLIGHT = 8
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
        load = Load(arena, IN_FLIGHT)
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
