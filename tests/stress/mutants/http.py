"""Malformed HTTP requests: wrong JSON, wrong fields, wrong lengths, wrong protocol; each is a good request with one thing wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from serving.contract.limits import Limits
from serving.contract.tensors import READER_TENSORS
from tests.stress.questions import Case

from .grpc import INT32, UNLIKELY_VALUES, Mutant, damaged_bytes, datatype, random_bytes

# Deeper nesting, or more chunks, than Triton's parser has stack for kills it: see faults/processes.py.
DEPTHS = (2, 100, 5_000)
Body = dict[str, Any]


def request(path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """A whole request; `headers` may override its length, or leave it out with an empty one."""
    fields = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """JSON so many levels deep."""
    return opening * depth + ("1" if opening != "[" else "") + closing * depth


def infer_body(case: Case) -> Body:
    """The case as the `infer` endpoint takes it."""
    inputs: list[Body] = []
    for spec in READER_TENSORS.inputs:
        if spec.name not in case.body():
            continue
        value = case.body()[spec.name]
        data = value if isinstance(value, list) else [value]
        inputs.append({"name": spec.name, "datatype": datatype(spec), "shape": [len(data)], "data": data})
    return {"inputs": inputs}


def field_missing(rng: random.Random, body: Body, limits: Limits) -> bool:
    del body[name := rng.choice(list(body))]
    return name in ("question", "passages")


def field_unlikely(rng: random.Random, body: Body, limits: Limits) -> bool:
    body[rng.choice(list(body))] = rng.choice(UNLIKELY_VALUES)
    return False  # a text in place of a list of them is one passage


def field_unknown(rng: random.Random, body: Body, limits: Limits) -> bool:
    body[rng.choice(["", "nonsense", "id", "parameters", "\0", "x" * 5000])] = rng.choice(UNLIKELY_VALUES)
    return False  # Triton takes what is no input for a parameter


def number_out_of_bounds(rng: random.Random, body: Body, limits: Limits) -> bool:
    body["max_new_tokens"] = rng.choice([-1, 0, *INT32, limits.max_new_tokens + 1])
    return True


def too_many_passages(rng: random.Random, body: Body, limits: Limits) -> bool:
    body["passages"] = ["w1"] * (limits.max_passages + rng.choice([1, 1000]))
    body.pop("titles")
    return True


def no_question(rng: random.Random, body: Body, limits: Limits) -> bool:
    body["question"] = rng.choice(["", "  ", "\n"])
    return True


FIELD_CHANGES: tuple[Callable[[random.Random, Body, Limits], bool], ...] = (
    field_missing,
    field_unlikely,
    field_unknown,
    number_out_of_bounds,
    too_many_passages,
    no_question,
)


def tensor_changed(rng: random.Random, case: Case) -> tuple[Body, bool]:
    """An `infer` body with one tensor's entry wrong."""
    body = infer_body(case)
    entry = rng.choice(body["inputs"])
    key = rng.choice([*entry, "parameters"])
    if key == "datatype":
        entry[key] = rng.choice(["", "NONSENSE", "bytes", "FP32", "BOOL", 5, None])
        return body, True
    if key == "shape":
        shapes = [[], [-1], [entry["shape"][0] + 1], "x", None, [[1]], 1.5, [10**30]]
        if entry["datatype"] == "BYTES":  # of numbers, a huge one kills Triton 2.51: see faults/processes.py
            shapes += [[2**62], [2**31, 2**31]]
        entry[key] = rng.choice(shapes)
        return body, True
    if key == "name":
        entry[key] = rng.choice(["", "nonsense", None, 5, ["question"]])
        return body, True
    if key == "parameters":
        names = {"shared_memory_region": "nobody", "binary_data_size": rng.choice([-1, 0, 10, 2**62, "x", None])}
        entry[key] = rng.choice([names, {"binary_data_size": 10}, [], 5, None, {"x": nested(50)}])
        return body, False
    entry[key] = rng.choice(UNLIKELY_VALUES)
    return body, False


def broken_json(rng: random.Random, text: str) -> bytes:
    """What is no JSON, or hardly."""
    whole = text.encode()
    return rng.choice(
        [
            b"",
            b"{",
            b"null",
            b'"x"',
            b"[]",
            whole[: rng.randrange(1, len(whole))],
            whole + whole,
            whole.replace(b'"question"', b'"question":"x","question"', 1),
            whole.replace(b": ", b": NaN, ", 1),
            whole.replace(b'"', b"'"),
            whole.replace(b"w", b"\\ud800", 1),
            whole.replace(b"w", b"\xff", 1),
            whole.decode().encode("utf-16"),
            f'{{"question": {nested(rng.choice(DEPTHS))}}}'.encode(),
            nested(rng.choice(DEPTHS), '{"a":', "}").encode(),
            damaged_bytes(rng, whole),
            random_bytes(rng, rng.randint(1, 3000)),
        ]
    )


def wrong_transport(rng: random.Random, path: str, body: bytes) -> tuple[str, bytes]:
    """What is wrong around the body: lengths, encodings, methods, paths."""
    length = rng.choice(["-1", "0", "5", str(len(body) + 50), "9" * 10, "9" * 25, "abc", "0x10", "1 2"])
    header = rng.choice(["-1", "0", "5", str(len(body) + 1), "9" * 12, "9" * 25, "abc"])
    part = max(len(body) // 7, 1)
    chunks = [body[i : i + part] for i in range(0, len(body), part)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    transfer = {"Content-Length": "", "Transfer-Encoding": "chunked"}
    return rng.choice(
        [
            ("wrong Content-Length", request(path, body, {"Content-Length": length})),
            ("no Content-Length", request(path, body, {"Content-Length": ""})),
            ("two lengths", request(path, body, {"content-length": "3"})),
            ("wrong Inference-Header-Content-Length", request(path, body, {"Inference-Header-Content-Length": header})),
            ("not gzip", request(path, body, {"Content-Encoding": rng.choice(["gzip", "deflate", "br", "x" * 500])})),
            ("wrong method", request(path, body, method=rng.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "NONSENSE", ""]))),
            ("wrong path", request(path + rng.choice(["/", "x", "/../../v2", "%00", "?a=b&a", "/" * 3000]), body)),
            (
                "wrong model",
                request(rng.choice(["/v2/models/nobody/generate", "/v2/models//infer", "/v2/models/fid/versions/9/infer"]), body),
            ),
            ("many headers", request(path, body, {f"X-{i}": "y" * 50 for i in range(500)})),
            ("chunks without end", request(path, chunked, transfer)),
            ("chunk of a wrong length", request(path, b"ffffffff\r\n" + chunked, transfer)),
            ("not HTTP", random_bytes(rng, rng.randint(1, 3000))),
            ("cut short", request(path, body)[: rng.randrange(1, 60)]),
        ]
    )


def http_mutants(rng: random.Random, cases: list[Case], model: str, limits: Limits) -> Iterator[Mutant]:
    """Malformed requests to one model, without end."""
    endpoints = ["generate_stream"] if model.endswith("_stream") else ["generate", "infer"]
    while True:
        case, endpoint, way = rng.choice(cases), rng.choice(endpoints), rng.random()
        path, body = f"/v2/models/{model}/{endpoint}", case.body()
        if way < 0.2:
            kind, content = wrong_transport(rng, path, json.dumps(body).encode())
            yield Mutant(kind, content, must_be_refused=False)
        elif way < 0.5:
            yield Mutant("broken JSON", request(path, broken_json(rng, json.dumps(body))), must_be_refused=False)
        elif endpoint == "infer":
            entry, must_be_refused = tensor_changed(rng, case)
            yield Mutant("tensor changed", request(path, json.dumps(entry).encode()), must_be_refused)
        else:
            change = rng.choice(FIELD_CHANGES)
            must_be_refused = change(rng, body, limits)
            yield Mutant(change.__name__.replace("_", " "), request(path, json.dumps(body).encode()), must_be_refused)
