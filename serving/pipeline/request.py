"""What a client sends, checked: every fault of a request in one message, with what is allowed.

Comes in: the request's arrays as Triton hands them over. Goes out: a `ReaderRequest`, or `RequestError`. Knows nothing of Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from serving.contract.limits import Limits

LIVENESS_ID = "pulse"  # id of a request that only asks whether the reader still replies (liveness.py): refused; only Triton counts it


class RequestError(ValueError):
    """A request that is refused; the message is what the client reads."""


@dataclasses.dataclass(frozen=True)
class ReaderRequest:
    """A question with its passages; `titles` is as long as `passages`, or None."""

    question: str
    passages: list[str]
    titles: list[str] | None
    max_new_tokens: int
    min_new_tokens: int


def read_request(tensors: Mapping[str, np.ndarray | None], limits: Limits) -> ReaderRequest:
    """Check a request against the limits.

    Args:
        tensors: by the names of READER_TENSORS; None where an optional one was left out.
        limits: of this reader.

    Raises:
        RequestError: naming everything that is wrong.
    """
    faults: list[str] = []
    question = _texts(tensors, "question", limits.max_question_characters, faults) or [""]
    passages = _texts(tensors, "passages", limits.max_passage_characters, faults) or []
    titles = _texts(tensors, "titles", limits.max_passage_characters, faults)
    if not question[0].strip() and not any(fault.startswith("question") for fault in faults):
        faults.append("question: wanted text, got an empty string")
    if not 1 <= len(passages) <= limits.max_passages:
        faults.append(f"passages: wanted 1 to {limits.max_passages}, got {len(passages)}")
    if titles is not None and len(titles) != len(passages):
        faults.append(f"titles: wanted one for each of the {len(passages)} passages or none at all, got {len(titles)}")
    most = _number(tensors, "max_new_tokens", 1, limits.max_new_tokens, limits.default_max_new_tokens, faults)
    least = _number(tensors, "min_new_tokens", 0, limits.max_new_tokens, 0, faults)
    if least > most and not any("new_tokens" in fault for fault in faults):
        faults.append(f"min_new_tokens: wanted at most max_new_tokens={most}, got {least}")
    if faults:
        raise RequestError("; ".join(faults))
    return ReaderRequest(question[0], passages, titles, most, least)


def _texts(tensors: Mapping[str, np.ndarray | None], name: str, longest: int, faults: list[str]) -> list[str] | None:
    array = tensors.get(name)
    if array is None:
        return None
    texts = []
    for i, value in enumerate(array.reshape(-1).tolist()):
        where = name if name == "question" else f"{name}[{i}]"
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            faults.append(f"{where}: wanted UTF-8, got byte 0x{value[error.start]:02x} at {error.start}")
            continue
        if len(text) > longest:
            faults.append(f"{where}: wanted at most {longest} characters, got {len(text)}")
        texts.append(text)
    # a refused text still counts, so that its fault is not reported a second time as a wrong number of texts
    return texts + [""] * (array.size - len(texts))


def _number(tensors: Mapping[str, np.ndarray | None], name: str, low: int, high: int, default: int, faults: list[str]) -> int:
    array = tensors.get(name)
    if array is None:
        return default
    value = int(array.reshape(-1)[0])
    if not low <= value <= high:
        faults.append(f"{name}: wanted {low} to {high}, got {value}")
    return value
