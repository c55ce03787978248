"""A question and its passages -> Triton's input tensors. Only this module checks and encodes requests.

In: a ReaderRequest. Out: `question: bytes[1]`, `passages: bytes[n]`, and if set `titles: bytes[n]`, `max_new_tokens: int32[1]`,
`min_new_tokens: int32[1]`, `num_beams: int32[1]`, `num_answers: int32[1]`, `length_penalty: float32[1]`, `allowed_answers: bytes[n]`,
`keep_encoder_tokens: float32[1]`, `keep_passages: int32[1]`, `drop_after: int32[1]`. It
does not check the server's limits (number and length of passages and allowed answers, number of tokens and beams): the server does.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Union

import numpy as np
from tritonclient.grpc import InferInput, service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from .errors import RequestRefused

Passage = Union[str, Mapping[str, Any]]
"""A passage's text, or a mapping with "text" and, optionally, "title"; other keys ("id", "score") are ignored."""

_INT32_MAX = 2**31 - 1
_FAULTS_SHOWN = 5  # a long list of passages often has one fault in all of them


@dataclasses.dataclass(frozen=True)
class ReaderRequest:
    """One question to a reader.

    Attributes:
        question: The question without prompt words, which the server adds.
        passages: At least one. Plain strings, or mappings that carry their own titles.
        titles: One per passage, if the passages do not carry them.
        max_new_tokens: Maximum number of answer tokens, with the end token; None: the server's default.
        min_new_tokens: Minimum number of answer tokens; None: the server's default.
        timeout_s: Time-out of this request in seconds; None: the client's.
        num_beams: Beams of a beam search, at least 1; None: a greedy answer.
        num_answers: How many answers to send, at most num_beams, or as many as are allowed; None: one.
        length_penalty: Answers are ordered by log_prob / tokens ** length_penalty; None: the server's default, 1.
        allowed_answers: The answer is the most probable of these. With num_beams it is what a beam search finds among them.
        keep_encoder_tokens: Share of the encoder tokens that are kept once `drop_after` tokens are generated, above 0; None: all.
        keep_passages: Passages that are kept then; None: all.
        drop_after: None: the server's default, 1. Not together with beams or allowed answers.
    """

    question: str
    passages: Iterable[Passage]
    titles: Iterable[str] | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    timeout_s: float | None = None
    num_beams: int | None = None
    num_answers: int | None = None
    length_penalty: float | None = None
    allowed_answers: Iterable[str] | None = None
    keep_encoder_tokens: float | None = None
    keep_passages: int | None = None
    drop_after: int | None = None


def request_from(item: ReaderRequest | Mapping[str, Any]) -> ReaderRequest:
    """The ReaderRequest itself, or one built from a mapping of its fields.

    Raises:
        RequestRefused: If it is neither, or if the mapping lacks a required field or has an unknown one.
    """
    if isinstance(item, ReaderRequest):
        return item
    fields = [field.name for field in dataclasses.fields(ReaderRequest)]
    if not isinstance(item, Mapping):
        raise RequestRefused(f"request: wanted a ReaderRequest or a mapping with {', '.join(fields)}, got {type(item).__name__}")
    missing, unknown = sorted({"question", "passages"} - set(item)), sorted(map(str, set(item) - set(fields)))
    if missing or unknown:
        found = "; ".join(f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has unknown", unknown)) if names)
        raise RequestRefused(f"request: {found}; wanted question and passages, and optionally {', '.join(fields[2:])}")
    return ReaderRequest(**item)


def tensors_from_request(request: ReaderRequest, *, model: str | None = None) -> dict[str, np.ndarray]:
    """The request's input tensors by name, text as UTF-8 in object arrays, in the order in which they are sent.

    Raises:
        RequestRefused: If the request is invalid for any server; the message names the faults.
    """
    faults: list[str] = []
    question = _encoded(request.question, "question", faults)
    if not request.question or (isinstance(request.question, str) and not request.question.strip()):
        faults.append(f"question: wanted some text, got {request.question!r}")
    texts, titles = _texts_and_titles(request, faults)
    limits = {name: _token_count(getattr(request, name), name, faults) for name in ("max_new_tokens", "min_new_tokens")}
    minimum, maximum = limits["min_new_tokens"], limits["max_new_tokens"]
    if minimum is not None and maximum is not None and minimum > maximum:
        faults.append(f"min_new_tokens: wanted at most max_new_tokens ({maximum}), got {minimum}")
    beams = {name: _token_count(getattr(request, name), name, faults) for name in ("num_beams", "num_answers")}
    allowed = _allowed_answers(request.allowed_answers, faults)
    most, what = (beams["num_beams"], "num_beams") if beams["num_beams"] or allowed is None else (len(allowed), "the allowed answers")
    if beams["num_answers"] is not None and beams["num_answers"] > (most or 1):
        faults.append(f"num_answers: wanted at most {what} ({most}), got {beams['num_answers']}")
    dropping = {name: _token_count(getattr(request, name), name, faults) for name in ("drop_after", "keep_passages")}
    share = request.keep_encoder_tokens
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
        faults.append(f"keep_encoder_tokens: wanted a share above 0 and at most 1, got {share!r}")
    penalty = request.length_penalty
    if penalty is not None and (isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not math.isfinite(penalty)):
        faults.append(f"length_penalty: wanted a number, got {penalty!r}")
    if faults:
        more = [f"and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
        raise RequestRefused("; ".join(faults[:_FAULTS_SHOWN] + more), model=model)

    tensors = {"question": np.array([question], dtype=np.object_), "passages": np.array(texts, dtype=np.object_)}
    if titles is not None:
        tensors["titles"] = np.array(titles, dtype=np.object_)
    numbers = {**limits, **beams, **dropping}
    tensors |= {name: np.array([value], dtype=np.int32) for name, value in numbers.items() if value is not None}
    if penalty is not None:
        tensors["length_penalty"] = np.array([penalty], dtype=np.float32)
    if share is not None:
        tensors["keep_encoder_tokens"] = np.array([share], dtype=np.float32)
    if allowed is not None:
        tensors["allowed_answers"] = np.array(allowed, dtype=np.object_)
    return tensors


def infer_inputs_from_tensors(tensors: Mapping[str, np.ndarray]) -> list[InferInput]:
    """The tensors as tritonclient's InferInputs."""
    inputs = []
    for name, array in tensors.items():
        infer_input = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        infer_input.set_data_from_numpy(array)
        inputs.append(infer_input)
    return inputs


def infer_message_from_tensors(model: str, tensors: Mapping[str, np.ndarray]) -> service_pb2.ModelInferRequest:
    """The tensors as a protocol message, for streaming, which does not use tritonclient's client."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in tensors.items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        message.raw_input_contents.append(serialize_byte_tensor(array).item() if array.dtype == np.object_ else array.tobytes())
    return message


def _texts_and_titles(request: ReaderRequest, faults: list[str]) -> tuple[list[bytes], list[bytes] | None]:
    """The passages' texts and titles; titles are None if no passage has one, and "" for a passage without one among others."""
    passages = _as_list(request.passages, "passages", faults)
    if not passages and not faults:
        faults.append("passages: wanted at least one, got none")
    texts: list[bytes] = []
    own_titles: list[bytes | None] = []
    for index, passage in enumerate(passages):
        where = f"passages[{index}]"
        if isinstance(passage, Mapping):
            if "text" not in passage:
                faults.append(f'{where}: wanted the key "text", got the keys {sorted(map(str, passage))}')
            else:
                texts.append(_encoded(passage["text"], f'{where}["text"]', faults))
            title = passage.get("title")
            own_titles.append(None if title is None else _encoded(title, f'{where}["title"]', faults))
        elif isinstance(passage, str):
            texts.append(_encoded(passage, where, faults))
            own_titles.append(None)
        else:
            faults.append(f'{where}: wanted a string or a mapping with "text" and "title", got {type(passage).__name__}')
    if request.titles is None:
        has_titles = any(title is not None for title in own_titles)
        return texts, [title or b"" for title in own_titles] if has_titles else None

    titles = [_encoded(title, f"titles[{index}]", faults) for index, title in enumerate(_as_list(request.titles, "titles", faults))]
    if len(titles) != len(passages):
        faults.append(f"titles: wanted one per passage ({len(passages)}), got {len(titles)}")
    if any(title is not None for title in own_titles):
        faults.append("titles: the passages carry their own titles; give them in one place or the other")
    return texts, titles


def _allowed_answers(answers: Iterable[str] | None, faults: list[str]) -> list[bytes] | None:
    if answers is None:
        return None
    found = len(faults)
    encoded = [_encoded(text, f"allowed_answers[{i}]", faults) for i, text in enumerate(_as_list(answers, "allowed_answers", faults))]
    if not encoded and len(faults) == found:
        faults.append("allowed_answers: wanted at least one, got none; leave it out to allow any answer")
    return encoded


def _as_list(value: object, name: str, faults: list[str]) -> list[Any]:
    """The items of an iterable. A single string is a fault: it would become one passage per letter."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        faults.append(f"{name}: wanted a list of them, got one {type(value).__name__}")
        return []
    return list(value)


def _encoded(text: object, name: str, faults: list[str]) -> bytes:
    if not isinstance(text, str):
        faults.append(f"{name}: wanted a string, got {type(text).__name__}")
        return b""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        faults.append(f"{name}: wanted text that UTF-8 can hold, got a lone surrogate {text[error.start]!a} at index {error.start}")
        return b""


def _token_count(value: Any, name: str, faults: list[str]) -> int | None:
    if value is None:
        return None
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        faults.append(f"{name}: wanted a whole number, got {value!r}")
        return None
    minimum = 0 if name == "min_new_tokens" else 1
    if not minimum <= count <= _INT32_MAX:
        faults.append(f"{name}: wanted {minimum} to {_INT32_MAX}, got {count}")
        return None
    return count
