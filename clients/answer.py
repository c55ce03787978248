"""What comes back from a reader: responses -> Answer, or pieces and then StreamedAnswer. The one place where results are parsed."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult

from clients.errors import ReaderError


@dataclasses.dataclass(frozen=True)
class Answer:
    """A reader's answer.

    Attributes:
        text: The answer.
        log_prob: Natural log-probability of the answer: the sum over its tokens.
        tokens: How many tokens were generated, the end token included.
        latency_s: From just before the request was encoded until the answer had arrived.
        passage_scores: What the answer rests on: for each passage, in the order given, the cross-attention of the first token over its
            tokens, summed over heads and averaged over layers. Empty if the server does not tell.
        token_log_probs: Log-probability of each token, the end token included. Empty if the server does not tell.
    """

    text: str
    log_prob: float
    tokens: int
    latency_s: float
    passage_scores: tuple[float, ...]
    token_log_probs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class StreamPiece:
    """A part of an answer under way: the texts of all pieces, joined with nothing between them, are the answer.

    Attributes:
        text: Never empty.
        elapsed_s: From just before the request was encoded until this piece was taken from the stream.
    """

    text: str
    elapsed_s: float


@dataclasses.dataclass(frozen=True)
class StreamedAnswer(Answer):
    """An answer that came in pieces.

    All times are of responses being taken from the stream, so a consumer slower than the reader sees its own pace in them. A reader answers
    each token as it comes, but for a token without text of its own, which comes with the next that has some.

    Attributes:
        time_to_first_token_s: Until the first response.
        inter_token_times_s: Between one response and the next, the last being the one with the totals.
    """

    time_to_first_token_s: float
    inter_token_times_s: tuple[float, ...]

    @property
    def mean_inter_token_s(self) -> float | None:
        """Mean time per token after the first; None for an answer of one token or one response.

        Divided by the tokens generated and not by the responses that came, so that it holds as well where one response brings several
        tokens and where the totals come right behind the last token.
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
    )


class StreamAssembler:
    """Makes one StreamedAnswer of a decoupled model's responses; knows nothing of gRPC.

    Every response carries a piece in `answer`; the last one, whose piece is often empty, also the totals `log_prob` and `tokens`. A
    response without outputs (the bare final flag) says nothing.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._texts: list[str] = []
        self._response_times_s: list[float] = []
        self._totals: Answer | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the totals have come: whatever goes wrong afterwards, the answer is whole."""
        return self._totals is not None

    def feed(self, result: InferResult, elapsed_s: float) -> StreamPiece | None:
        """Takes the next response, which came `elapsed_s` after the start; gives its piece, or None where it has no text.

        Raises:
            ReaderError: If the response is not one of a streaming reader's.
        """
        names = {output.name for output in result.get_response().outputs}
        if not names or self.is_complete:
            return None
        text = _text(result, self._model)
        self._texts.append(text)
        self._response_times_s.append(elapsed_s)
        if "log_prob" in names:
            self._totals = answer_from_result(result, model=self._model, latency_s=elapsed_s)
        return StreamPiece(text, elapsed_s) if text else None

    def finish(self) -> StreamedAnswer:
        """The whole answer.

        Raises:
            ReaderError: If the stream ended before the totals came.
        """
        if self._totals is None:
            count = len(self._texts)
            raise ReaderError(
                f"{self._model}: the stream ended after {count} responses without log_prob and tokens, so the answer is not whole; "
                "check that it is a streaming reader (fid_stream, fido_stream) and look into the server's log",
                model=self._model,
            )
        times_s = self._response_times_s
        return StreamedAnswer(
            **{**dataclasses.asdict(self._totals), "text": "".join(self._texts), "latency_s": times_s[-1]},
            time_to_first_token_s=times_s[0],
            inter_token_times_s=tuple(later - earlier for earlier, later in itertools.pairwise(times_s)),
        )


def _text(result: InferResult, model: str) -> str:
    value = _scalar(result, "answer", model)
    try:
        return value.decode("utf-8")
    except (AttributeError, UnicodeDecodeError) as error:
        raise ReaderError(f"{model}: answer: wanted UTF-8 text, got {value!r}", model=model) from error


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
