"""Malformed gRPC requests, drawn at random from the tensor specs: each is a good request with one thing wrong."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from tritonclient.grpc import service_pb2

from serving.contract.limits import Limits
from serving.contract.tensors import READER_TENSORS, TRITON_DTYPES, TensorSpec
from tests.stress.questions import Case

# What gRPC and HTTP mutants share: the malformed request as a value, and the lists that both draw from.

INT32 = (-(2**31), 2**31 - 1)
UNLIKELY_TEXTS = (
    "\0",
    "\ufeff",
    "\u202e right to left",
    "👨‍👩‍👧‍👦" * 10,
    "e" + "\u0301" * 200,
    "<pad></s><extra_id_0>",
    "{question} {title} {context} %s %n",
    "a" * 150,
    "'; drop table questions; --",
    "\r\n\r\nGET / HTTP/1.1\r\n",
)
# for a JSON field that should be something else
UNLIKELY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, -0.0, 2**31, 2**63, 2**64, 10**400, "", "x", [], {}, [[]], [{}], [None], [[["x"]]], {"question": "x"},
    ["x", 1], ["x", None], ["x"] * 1000, *UNLIKELY_TEXTS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A malformed request.

    Attributes:
        kind: what is wrong with it.
        content: the bytes to send: a message for gRPC, a whole request from its first line on for HTTP.
        must_be_refused: false where it may turn out to be a good request.
    """

    kind: str
    content: bytes
    must_be_refused: bool


def random_bytes(rng: random.Random, length: int) -> bytes:
    """So many random bytes."""
    return rng.getrandbits(8 * length).to_bytes(length, "little") if length else b""


Message = Any  # service_pb2.ModelInferRequest: protobuf's generated classes are untyped
INPUTS = {spec.name: spec for spec in READER_TENSORS.inputs}
DATATYPES = (
    *(name.removeprefix("TYPE_").replace("STRING", "BYTES") for name in TRITON_DTYPES.values()),
    "BOOL",
    "INT64",
    "UINT8",
    "FP64",
    "BF16",
)
PARAMETERS: tuple[tuple[str, Any], ...] = (
    *(("int64_param", number) for number in (-(2**63), -1, 0, 1, 2**63 - 1)),
    *(("string_param", text) for text in ("", "1", "x" * 1000)),
    ("bool_param", True),
    ("double_param", 1e300),
)


def datatype(spec: TensorSpec) -> str:
    """Triton's name of a spec's dtype in the inference protocol."""
    return {"bytes": "BYTES", "int32": "INT32", "float32": "FP32", "float16": "FP16"}[spec.dtype]


def serialized(texts: list[bytes]) -> bytes:
    """BYTES elements as they travel: each behind its length."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def put(message: Message, name: str, content: bytes, shape: list[int]) -> None:
    """Set the content and shape of one input."""
    i = [tensor.name for tensor in message.inputs].index(name)
    message.raw_input_contents[i] = content
    del message.inputs[i].shape[:]
    message.inputs[i].shape.extend(shape)


def _any(rng: random.Random, message: Message) -> int:
    return rng.randrange(len(message.inputs))


def wrong_datatype(rng: random.Random, message: Message, limits: Limits) -> bool:
    tensor = message.inputs[_any(rng, message)]
    wanted = datatype(INPUTS[tensor.name])
    tensor.datatype = rng.choice([d for d in (*DATATYPES, "", "bytes", "NONSENSE") if d != wanted])
    return True


def wrong_shape(rng: random.Random, message: Message, limits: Limits) -> bool:
    tensor = message.inputs[_any(rng, message)]
    had = list(tensor.shape)
    shapes = [[], [0], [-1], [2**31], [2**62, 4], [-(2**63)], [*had, 1], [1, *had], [had[0] + 1], [2**40] * 3, [1] * 1000]
    del tensor.shape[:]
    tensor.shape.extend(rng.choice([shape for shape in shapes if shape != had]))
    return True


def wrong_name(rng: random.Random, message: Message, limits: Limits) -> bool:
    tensor = message.inputs[_any(rng, message)]
    tensor.name = rng.choice(["", tensor.name.upper(), f"{tensor.name} ", "x" * 5000, "input_ids", "❓"])
    return True


def missing_input(rng: random.Random, message: Message, limits: Limits) -> bool:
    i = _any(rng, message)
    spec = INPUTS[message.inputs[i].name]
    del message.inputs[i], message.raw_input_contents[i]
    return not spec.optional


def input_twice(rng: random.Random, message: Message, limits: Limits) -> bool:
    i = _any(rng, message)
    message.inputs.add().CopyFrom(message.inputs[i])
    message.raw_input_contents.append(message.raw_input_contents[i])
    return True


def unknown_input(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.inputs.add(name=rng.choice(["nonsense", "answer", "START"]), datatype="INT32", shape=[1])
    message.raw_input_contents.append(b"\1\0\0\0")
    return True


def content_cut(rng: random.Random, message: Message, limits: Limits) -> bool:
    i = _any(rng, message)
    content = message.raw_input_contents[i]
    message.raw_input_contents[i] = content[: rng.randrange(len(content))]
    return True


def content_too_long(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.raw_input_contents[_any(rng, message)] += random_bytes(rng, rng.randint(1, 64))
    return True


def content_random(rng: random.Random, message: Message, limits: Limits) -> bool:
    i = _any(rng, message)
    message.raw_input_contents[i] = random_bytes(rng, len(message.raw_input_contents[i]))
    return False  # four random bytes may be a number in bounds


def length_lies(rng: random.Random, message: Message, limits: Limits) -> bool:
    i = next(i for i, tensor in enumerate(message.inputs) if tensor.name == "passages")
    content = message.raw_input_contents[i]
    (length,) = struct.unpack("<I", content[:4])
    message.raw_input_contents[i] = struct.pack("<I", rng.choice([2**32 - 1, 2**31, len(content), length + 1, length + 5])) + content[4:]
    return True


def not_utf8(rng: random.Random, message: Message, limits: Limits) -> bool:
    put(message, "question", serialized([rng.choice([b"\xff\xfe", b"abc\x80", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"])]), [1])
    return True


def unlikely_text(rng: random.Random, message: Message, limits: Limits) -> bool:
    put(message, "question", serialized([rng.choice(UNLIKELY_TEXTS).encode()]), [1])
    return False


def no_question(rng: random.Random, message: Message, limits: Limits) -> bool:
    put(message, "question", serialized([rng.choice([b"", b" ", b"\n\t ", "\u2003".encode()])]), [1])
    return True


def too_long(rng: random.Random, message: Message, limits: Limits) -> bool:
    put(message, "question", serialized([b"w" * (limits.max_question_characters + rng.choice([1, 100_000]))]), [1])
    return True


def too_many_passages(rng: random.Random, message: Message, limits: Limits) -> bool:
    n = limits.max_passages + rng.choice([1, 2, 5000])
    put(message, "passages", serialized([b"w1"] * n), [n])
    return True


def no_passages(rng: random.Random, message: Message, limits: Limits) -> bool:
    put(message, "passages", b"", [0])
    return True


def other_number_of_titles(rng: random.Random, message: Message, limits: Limits) -> bool:
    n = message.inputs[[tensor.name for tensor in message.inputs].index("passages")].shape[0] + rng.choice([1, 2, 100])
    put(message, "titles", serialized([b"w1"] * n), [n])
    return True


def number_out_of_bounds(rng: random.Random, message: Message, limits: Limits) -> bool:
    name = rng.choice(["max_new_tokens", "min_new_tokens"])
    numbers = [-1, *INT32, limits.max_new_tokens + 1, *([0] if name == "max_new_tokens" else [])]
    put(message, name, struct.pack("<i", rng.choice(numbers)), [1])
    return True


def content_missing(rng: random.Random, message: Message, limits: Limits) -> bool:
    del message.raw_input_contents[rng.randrange(len(message.raw_input_contents)) :]
    return True


def content_to_spare(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.raw_input_contents.append(random_bytes(rng, rng.randint(0, 100)))
    return False  # Triton 2.51 does not mind


def content_in_both_places(rng: random.Random, message: Message, limits: Limits) -> bool:
    i = next(i for i, tensor in enumerate(message.inputs) if tensor.name == "question")
    message.inputs[i].contents.bytes_contents.append(b"w1")
    return True


def another_model(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.model_name = rng.choice(["", "nobody", "../fid", "x" * 5000, f"{message.model_name}_encoder"])
    return True


def another_version(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.model_version = rng.choice(["0", "2", "-2", "x", "-1x", "9" * 40])
    return True


def shared_memory(rng: random.Random, message: Message, limits: Limits) -> bool:
    where = rng.choice([message.inputs[_any(rng, message)], message.outputs.add(name="answer")])
    where.parameters["shared_memory_region"].string_param = rng.choice(["", "nobody", "/etc/passwd", "x" * 5000])
    where.parameters["shared_memory_byte_size"].int64_param = rng.choice([0, 8, -1, 2**62])
    del message.raw_input_contents[:]
    return True


def unknown_output(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.outputs.add(name=rng.choice(["", "nonsense", "question", "encoder_hidden_states"]))
    return True


def output_parameters(rng: random.Random, message: Message, limits: Limits) -> bool:
    # not of a text: that kills Triton 2.51, see faults/processes.py
    output = message.outputs.add(name=rng.choice([spec.name for spec in READER_TENSORS.outputs if spec.dtype != "bytes"]))
    output.parameters["classification"].int64_param = rng.choice([-1, 0, 1, 3, 2**40])
    message.outputs.add().CopyFrom(output)
    return False


def request_parameters(rng: random.Random, message: Message, limits: Limits) -> bool:
    names = ["sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output", "nonsense", ""]
    for name in rng.sample(names, 3):
        kind, value = rng.choice(PARAMETERS)
        setattr(message.parameters[name], kind, value)
    return False


def unlikely_id(rng: random.Random, message: Message, limits: Limits) -> bool:
    message.id = rng.choice(["\0", "x" * 100_000, '"}\n{"', "%s%n", "❓"])
    return False


CHANGES: tuple[Callable[[random.Random, Message, Limits], bool], ...] = (
    wrong_datatype, wrong_shape, wrong_name, missing_input, input_twice, unknown_input, content_cut, content_too_long, content_random,
    length_lies, not_utf8, unlikely_text, no_question, too_long, too_many_passages, no_passages, other_number_of_titles,
    number_out_of_bounds, content_missing, content_to_spare, content_in_both_places, another_model, another_version, shared_memory,
    unknown_output, output_parameters, request_parameters, unlikely_id,
)  # fmt: skip


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """What is no longer the message that it was, and perhaps none at all."""
    how = rng.randrange(3)
    if how == 0:
        return random_bytes(rng, rng.randint(1, 300))
    if how == 1:
        return content[: rng.randrange(len(content))]
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def grpc_mutants(rng: random.Random, cases: list[Case], model: str, limits: Limits) -> Iterator[Mutant]:
    """Malformed requests to one model, without end. Whoever answers one that `must_be_refused` answers wrong."""
    while True:
        message = service_pb2.ModelInferRequest()
        message.CopyFrom(rng.choice(cases).message(model))
        if rng.random() < 0.1:
            yield Mutant("damaged bytes", damaged_bytes(rng, message.SerializeToString()), must_be_refused=False)
            continue
        change = rng.choice(CHANGES)
        must_be_refused = change(rng, message, limits)
        yield Mutant(change.__name__.replace("_", " "), message.SerializeToString(), must_be_refused)
