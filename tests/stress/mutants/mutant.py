"""What gRPC and HTTP mutants share: the malformed request as a value, and the lists that both draw from."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

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
