"""A client's request, checked: every fault in one message, each with what is allowed.

Comes in: the request's arrays as Triton passes them. Goes out: a `ReaderRequest`, or `RequestError`. Knows nothing of Triton.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.contract.limits import Limits
from serving.contract.tensors import READER_TENSORS

from .elimination import EliminationOptions

LIVENESS_ID = "liveness"  # request id of the launcher's probe (launcher/liveness.py); it is refused and counted nowhere
# Environment variable with the path of a file: while it exists, a reader takes no new questions. The launcher makes it before the end.
REFUSING_FILE_VARIABLE = "FIDO_REFUSING_FILE"
# The request parameters; all other options are tensors. HTTP generate of Triton 2.51 passes both as parameters.
TIMEOUT, ID = "timeout", "id"  # microseconds, as in Triton's protocol; text
TRITONS_OWN = "triton_"  # parameters that Triton's clients add begin like this
DEFAULT_LENGTH_PENALTY, MAX_LENGTH_PENALTY = 1.0, 10  # the default is transformers'
FAULTS_SHOWN = 10  # in a refusal; a request of a million bad passages gets a short answer


class RequestError(ValueError):
    """A request that is refused; the client reads the message."""

    @classmethod
    def of(cls, faults: list[str]) -> RequestError:
        """An error that names FAULTS_SHOWN of the faults, and how many more there are."""
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        return cls("; ".join([*faults[:FAULTS_SHOWN], *more]))


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """Of beam search: the beams, how many of their answers are sent, and the exponent of the length that scores are divided by."""

    num_beams: int
    num_answers: int
    length_penalty: float


@dataclasses.dataclass(frozen=True)
class Choices:
    """The answers that a request may be answered with, and how many of them are sent. Without beams every one of them is scored."""

    answers: list[str]
    num_answers: int


@dataclasses.dataclass(frozen=True)
class ReaderRequest:
    """A question with its passages.

    Attributes:
        titles: as long as `passages`, or None.
        timeout_us: 0 = none.
        id: "" = none.
        beams: of beam search; None = greedy, or all choices scored.
        choices: None = any answer.
        elimination: None = all encoder tokens stay.
    """

    question: str
    passages: list[str]
    titles: list[str] | None
    max_new_tokens: int
    min_new_tokens: int
    timeout_us: int = 0
    id: str = ""
    beams: BeamOptions | None = None
    choices: Choices | None = None
    elimination: EliminationOptions | None = None


def read_request(
    tensors: Mapping[str, np.ndarray | None], limits: Limits, parameters: Mapping[str, Any] | None = None, *, streams: bool = False
) -> ReaderRequest:
    """Check a request against the limits.

    Args:
        tensors: by the names of READER_TENSORS; None for an optional one that the client left out.
        limits: of this reader.
        parameters: of the request. Over HTTP generate these are the keys of the JSON body that name no tensor.
        streams: the answer is sent while it is generated, which neither beam search nor a choice among answers can do.

    Raises:
        RequestError: naming everything that is wrong, FAULTS_SHOWN faults at most.
    """
    n_passages, n_titles = (0 if tensors.get(name) is None else tensors[name].size for name in ("passages", "titles"))  # type: ignore[union-attr]
    faults: list[str] = []
    question = _texts(tensors, "question", limits.max_question_characters, faults) or [""]
    if not question[0].strip() and not faults:
        faults.append("question: wanted text, got an empty string")
    # The number of texts is checked before any is decoded: it costs nothing, and a million passages must be refused at once.
    passages: list[str] = []
    titles: list[str] | None = None
    if 1 <= n_passages <= limits.max_passages:
        passages = _texts(tensors, "passages", limits.max_passage_characters, faults) or []
    else:
        faults.append(f"passages: wanted 1 to {limits.max_passages}, got {n_passages}")
    if tensors.get("titles") is not None and n_titles != n_passages:
        faults.append(f"titles: wanted one for each of the {n_passages} passages or none at all, got {n_titles}")
    elif passages:
        titles = _texts(tensors, "titles", limits.max_passage_characters, faults)
    allowed = _allowed_answers(tensors, limits, faults, streams=streams)
    maximum, minimum = _number(tensors, "max_new_tokens"), _number(tensors, "min_new_tokens")
    if allowed and minimum:
        faults.append(f"min_new_tokens: wanted none beside allowed_answers, which have their lengths, got {minimum}")
    maximum = limits.max_new_tokens if allowed and maximum is None else maximum  # the default is meant for open answers
    maximum, minimum = _new_tokens(maximum, minimum, limits, faults)
    beams = _beams(tensors, limits, len(allowed), faults, streams=streams)
    choices = Choices(allowed, _number(tensors, "num_answers") or 1) if allowed else None
    elimination = _elimination(tensors, limits, faults, has_beams=beams is not None or choices is not None)
    timeout_us, request_id = _timeout_and_id(parameters or {}, faults)
    if faults:
        raise RequestError.of(faults)
    return ReaderRequest(question[0], passages, titles, maximum, minimum, timeout_us, request_id, beams, choices, elimination)


def _texts(tensors: Mapping[str, np.ndarray | None], name: str, max_characters: int, faults: list[str]) -> list[str] | None:
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
        if len(text) > max_characters:
            faults.append(f"{where}: wanted at most {max_characters} characters, got {len(text)}")
        texts.append(text)
    return texts


def _timeout_and_id(parameters: Mapping[str, Any], faults: list[str]) -> tuple[int, str]:
    """The parameters `timeout` and `id`; a parameter of any other name is a fault, because it would change nothing."""
    known = [*(spec.name for spec in READER_TENSORS.inputs), ID, TIMEOUT]
    for name in parameters:
        if name in (TIMEOUT, ID) or name.startswith(TRITONS_OWN):
            continue
        if name in known:
            faults.append(f"{name}: wanted an input tensor, got a request parameter")
            continue
        close = difflib.get_close_matches(name, known, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        faults.append(f"{name}: unknown; {meant}known are {', '.join(known)} (microseconds)")
    timeout = parameters.get(TIMEOUT, 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        faults.append(f"{TIMEOUT}: wanted a whole number of microseconds, got {timeout!r}")
        timeout = 0
    return timeout, str(parameters.get(ID, ""))


def checked_new_tokens(max_new_tokens: int | None, min_new_tokens: int | None, limits: Limits) -> tuple[int, int]:
    """max_new_tokens and min_new_tokens of a request, None = the default.

    Raises:
        RequestError: naming what is outside the limits.
    """
    faults: list[str] = []
    numbers = _new_tokens(max_new_tokens, min_new_tokens, limits, faults)
    if faults:
        raise RequestError("; ".join(faults))
    return numbers


def _new_tokens(maximum: int | None, minimum: int | None, limits: Limits, faults: list[str]) -> tuple[int, int]:
    maximum = limits.default_max_new_tokens if maximum is None else maximum
    minimum = 0 if minimum is None else minimum
    out_of_range = [
        f"{name}: wanted {lowest} to {limits.max_new_tokens}, got {value}"
        for name, lowest, value in (("max_new_tokens", 1, maximum), ("min_new_tokens", 0, minimum))
        if not lowest <= value <= limits.max_new_tokens
    ]
    if minimum > maximum and not out_of_range:
        out_of_range.append(f"min_new_tokens: wanted at most max_new_tokens={maximum}, got {minimum}")
    faults += out_of_range
    return maximum, minimum


def _allowed_answers(tensors: Mapping[str, np.ndarray | None], limits: Limits, faults: list[str], *, streams: bool) -> list[str]:
    """The answers to choose from; none of a request that names none. What they are in tokens is not checked here."""
    array = tensors.get("allowed_answers")
    if array is None:
        return []
    if streams:
        faults.append(f"allowed_answers: wanted none in a stream: the answer is known once all have been compared; got {array.size}")
    elif not limits.max_allowed_answers:
        why = "its engine decodes greedily, or max_allowed_answers is 0"
        faults.append(f"allowed_answers: wanted none, as this reader cannot choose among them ({why}); got {array.size}")
    elif not 1 <= array.size <= limits.max_allowed_answers:
        faults.append(f"allowed_answers: wanted 1 to {limits.max_allowed_answers}, got {array.size}")
    else:
        answers = _texts(tensors, "allowed_answers", limits.max_allowed_answer_characters, faults) or []
        faults += [f"allowed_answers[{i}]: wanted text, got an empty string" for i, answer in enumerate(answers) if not answer.strip()]
        return answers
    return []


def _beams(
    tensors: Mapping[str, np.ndarray | None], limits: Limits, n_allowed: int, faults: list[str], *, streams: bool
) -> BeamOptions | None:
    """None without beams: for a request without num_beams, or with one beam and any answer allowed, which is greedy."""
    num_beams, num_answers = _number(tensors, "num_beams"), _number(tensors, "num_answers")
    array = tensors.get("length_penalty")
    length_penalty = DEFAULT_LENGTH_PENALTY if array is None else float(array.reshape(-1)[0])
    if num_beams is None:
        alone = ("num_answers", "length_penalty") if tensors.get("allowed_answers") is None else ("length_penalty",)
        faults += [f"{name}: wanted num_beams with it" for name in alone if tensors.get(name) is not None]
        if n_allowed and num_answers is not None and not 1 <= num_answers <= n_allowed:
            faults.append(f"num_answers: wanted 1 to {n_allowed}, the allowed_answers, got {num_answers}")
        return None
    found = len(faults)
    if streams and num_beams != 1:
        faults.append(f"num_beams: wanted none, or 1, in a stream: its text is final, and beams change theirs; got {num_beams}")
    elif not 1 <= num_beams <= limits.max_num_beams:
        faults.append(f"num_beams: wanted 1 to {limits.max_num_beams}, got {num_beams}")
    elif num_answers is not None and not 1 <= num_answers <= num_beams:
        faults.append(f"num_answers: wanted 1 to num_beams={num_beams}, got {num_answers}")
    elif num_answers is not None and n_allowed and num_answers > n_allowed:
        faults.append(f"num_answers: wanted 1 to {n_allowed}, the allowed_answers, got {num_answers}")
    if not abs(length_penalty) <= MAX_LENGTH_PENALTY:  # a NaN too
        faults.append(f"length_penalty: wanted -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, got {length_penalty}")
    if (num_beams == 1 and not n_allowed) or len(faults) > found:
        return None
    return BeamOptions(num_beams, num_answers or 1, length_penalty)


def _elimination(
    tensors: Mapping[str, np.ndarray | None], limits: Limits, faults: list[str], *, has_beams: bool
) -> EliminationOptions | None:
    """None where all encoder tokens stay."""
    array, passages, after = tensors.get("keep_encoder_tokens"), _number(tensors, "keep_passages"), _number(tensors, "drop_after")
    share = 1.0 if array is None else round(float(array.reshape(-1)[0]), 7)  # as it was written: 0.3 is 0.30000001 in float32
    named = [name for name in ("drop_after", "keep_encoder_tokens", "keep_passages") if tensors.get(name) is not None]
    if not named:
        return None
    found = len(faults)
    if not limits.token_elimination:
        faults.append(f"{named[0]}: wanted none, as this reader keeps all encoder tokens (its engine, or token_elimination is 0)")
    elif has_beams:
        faults.append(f"{named[0]}: wanted none beside num_beams and allowed_answers, which share one question's encoder tokens")
    elif named == ["drop_after"]:
        faults.append("drop_after: wanted keep_encoder_tokens or keep_passages with it")
    if after is not None and not 1 <= after <= limits.max_new_tokens:
        faults.append(f"drop_after: wanted 1 to {limits.max_new_tokens}, got {after}")
    if not 0 < share <= 1:  # a NaN too
        faults.append(f"keep_encoder_tokens: wanted a share above 0 and at most 1, got {share:g}")
    if passages is not None and passages < 1:
        faults.append(f"keep_passages: wanted at least 1, got {passages}")
    if len(faults) > found or (share == 1 and passages is None):
        return None
    return EliminationOptions(after or 1, share, passages)


def _number(tensors: Mapping[str, np.ndarray | None], name: str) -> int | None:
    array = tensors.get(name)
    return None if array is None else int(array.reshape(-1)[0])
