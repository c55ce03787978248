"""A reader's responses -> Answer, or StreamPieces and a StreamedAnswer. Only this module parses results."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult

from .errors import ReaderError, ReaderUnavailable


@dataclasses.dataclass(frozen=True)
class Answer:
    """A reader's answer.

    Attributes:
        text: The answer.
        log_prob: Natural log-probability of the answer: the sum over its tokens.
        tokens: Number of generated tokens, with the end token.
        latency_s: Seconds from just before the request was encoded until the answer arrived.
        passage_scores: Attribution to the passages, in the request's order: the first token's cross-attention to each passage's tokens,
            normalised to sum to 1 over the passages. Empty if the server does not send it.
        token_log_probs: Log-probability of each token, with the end token. Empty if the server does not send it.
        answers: All answers of a beam search, or the best of the allowed answers; the best, which is `text`, first. Empty for a greedy
            answer.
        answer_log_probs: Log-probability of each of `answers`. Of allowed answers without num_beams it is that among them: the
            probabilities of all allowed answers sum to 1.
    """

    text: str
    log_prob: float
    tokens: int
    latency_s: float
    passage_scores: tuple[float, ...]
    token_log_probs: tuple[float, ...]
    answers: tuple[str, ...] = ()
    answer_log_probs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamPiece:
    """A part of a streamed answer: the concatenated texts of all pieces are the answer.

    Attributes:
        text: Never empty.
        elapsed_s: Seconds from just before the request was encoded until this piece was read from the stream.
    """

    text: str
    elapsed_s: float


@dataclasses.dataclass(frozen=True)
class StreamedAnswer(Answer):
    """An answer that was streamed.

    Times are taken when a response is read from the stream, so a consumer slower than the reader measures itself. A reader sends each token
    at once, except a token without text, which it sends with the next token that has some.

    Attributes:
        time_to_first_token_s: Seconds until the first response.
        inter_token_times_s: Seconds between consecutive responses; the last response has the totals.
    """

    time_to_first_token_s: float = 0.0
    inter_token_times_s: tuple[float, ...] = ()

    @property
    def mean_inter_token_s(self) -> float | None:
        """Mean time per token after the first; None for an answer of one token or one response.

        The divisor is the number of tokens, not of responses: one response may carry several tokens, and the totals may follow the last
        token at once.
        """
        if self.tokens < 2 or not self.inter_token_times_s:
            return None
        return (self.latency_s - self.time_to_first_token_s) / (self.tokens - 1)


def answer_from_result(result: InferResult, *, model: str, latency_s: float) -> Answer:
    """The answer in a unary model's response.

    Raises:
        ReaderError: If the response is not a reader's: `answer: bytes[1]`, `log_prob: fp32[1]`, `tokens: int32[1]`.
    """
    return Answer(
        text=_text(result, model),
        log_prob=float(_scalar(result, "log_prob", model)),
        tokens=int(_scalar(result, "tokens", model)),
        latency_s=latency_s,
        passage_scores=_vector(result, "passage_scores"),
        token_log_probs=_vector(result, "token_log_probs"),
        answers=_texts(result, model),
        answer_log_probs=_vector(result, "answer_log_probs"),
    )


class StreamAssembler:
    """Assembles a decoupled model's responses into one StreamedAnswer, without gRPC.

    Every response carries a piece in `answer`. The last one, whose piece is often empty, also carries the totals `log_prob` and `tokens`. A
    response without outputs (only the final flag) is ignored. After `restart` the same answer comes once more, from its start.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._text = ""  # of this attempt
        self._given = ""  # of all pieces, of whichever attempt
        self._responses = 0
        self._response_times_s: list[float] = []
        self._totals: Answer | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the totals arrived: an error after them does not matter, since the answer is complete."""
        return self._totals is not None

    def restart(self) -> None:
        """The question has been sent again: what comes next is the answer from its start."""
        self._text, self._responses = "", 0

    def feed(self, result: InferResult, elapsed_s: float) -> StreamPiece | None:
        """Add the next response, `elapsed_s` after the start; return its piece without what was given before, or None if nothing is left.

        Raises:
            ReaderError: If the response is not one of a streaming reader's, or the answer is another than the one that had begun.
        """
        names = {output.name for output in result.get_response().outputs}
        if not names or self.is_complete:
            return None
        totals = answer_from_result(result, model=self._model, latency_s=elapsed_s) if "log_prob" in names else None
        self._text += _text(result, self._model)
        self._responses += 1
        both = min(len(self._text), len(self._given))
        if self._text[:both] != self._given[:both] or (totals is not None and both < len(self._given)):
            raise ReaderError(
                f"{self._model}: the connection broke after {self._given!r}, and the question, sent again, is answered {self._text!r}; "
                "ask once more and drop what came, and check that all servers serve the same engines",
                model=self._model,
            )
        piece, self._given, self._totals = self._text[both:], self._given + self._text[both:], totals
        if self._responses > len(self._response_times_s):
            self._response_times_s.append(elapsed_s)
        return StreamPiece(piece, elapsed_s) if piece else None

    def finish(self) -> StreamedAnswer:
        """The complete answer.

        Raises:
            ReaderUnavailable: If the stream ended before the totals arrived, as where its server died: over HTTP that looks like an end.
        """
        if self._totals is None:
            raise ReaderUnavailable(
                f"{self._model}: the stream ended after {self._responses} responses without log_prob and tokens, so the answer is "
                "incomplete; check that the server lives, its log, and that the model is a streaming reader (fid_stream, fido_stream)",
                model=self._model,
                status="UNAVAILABLE",
            )
        times_s = self._response_times_s
        return StreamedAnswer(
            **{**dataclasses.asdict(self._totals), "text": self._given, "latency_s": times_s[-1]},
            time_to_first_token_s=times_s[0],
            inter_token_times_s=tuple(later - earlier for earlier, later in zip(times_s, times_s[1:])),
        )


def _text(result: InferResult, model: str) -> str:
    return _decoded(_scalar(result, "answer", model), "answer", model)


def _texts(result: InferResult, model: str) -> tuple[str, ...]:
    """The answers of beam search; none if they were not sent."""
    array: np.ndarray | None = result.as_numpy("answers")
    return () if array is None else tuple(_decoded(value, "answers", model) for value in array.reshape(-1).tolist())


def _decoded(value: Any, name: str, model: str) -> str:
    try:
        return str(value.decode("utf-8"))
    except (AttributeError, UnicodeDecodeError) as error:
        raise ReaderError(f"{model}: {name}: wanted UTF-8 text, got {value!r}", model=model) from error


def _scalar(result: InferResult, name: str, model: str) -> Any:
    """The one element of an output."""
    array: np.ndarray | None = result.as_numpy(name)
    if array is None or array.size != 1:
        got = {output.name: list(output.shape) for output in result.get_response().outputs}
        raise ReaderError(f"{model}: wanted one element in the output {name}, got the outputs {got}; is it a reader?", model=model)
    return array.reshape(-1)[0]


def _vector(result: InferResult, name: str) -> tuple[float, ...]:
    """All elements of an output; none if it was not sent."""
    array: np.ndarray | None = result.as_numpy(name)
    return () if array is None else tuple(float(value) for value in array.reshape(-1))
