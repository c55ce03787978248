"""A reader evaluated on a data set: Examples -> one Prediction per question and one Evaluation; two readers compared. Prints nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .answer import Answer
from .data.examples import Example
from .errors import ReaderError, ReaderUnavailable
from .metrics import exact_match, f1_score, normalize_answer, percentile
from .reader_client import ReaderClient
from .request import ReaderRequest

N_BEST = (1, 4, 10)  # answers that an oracle chooses from


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The reader's answer to one example.

    Attributes:
        id: The example's.
        question: The example's.
        answers: The example's right answers.
        answer: The reader's; None if the request failed.
        error: Why it failed; None if it did not.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    answer: Answer | None
    error: str | None = None

    @property
    def em(self) -> bool | None:
        """Whether the answer is right, by FiD's exact match. A failed request is wrong; None if no right answer is known."""
        if not self.answers:
            return None
        return self.answer is not None and exact_match(self.answer.text, self.answers)

    def em_at(self, n: int) -> bool | None:
        """Whether one of the best `n` answers of a beam search is right: an oracle's choice among them. None as for `em`."""
        if not self.answers:
            return None
        return self.answer is not None and any(exact_match(text, self.answers) for text in self.answer.answers[:n])

    @property
    def f1(self) -> float | None:
        """F1 of the answer's words, 0 to 1. A failed request has 0; None if no right answer is known."""
        if not self.answers:
            return None
        return 0.0 if self.answer is None else f1_score(self.answer.text, self.answers)

    def as_json(self) -> dict[str, Any]:
        """The line of a predictions file: prediction, log_prob, tokens and latency_s, or error instead."""
        line: dict[str, Any] = {"id": self.id, "question": self.question, "answers": list(self.answers), "em": self.em}
        if self.answer is None:
            return line | {"prediction": None, "error": self.error}
        answer = self.answer
        if answer.answers:
            line |= {"predictions": list(answer.answers), "log_probs": list(answer.answer_log_probs)}
        return line | {"prediction": answer.text, "log_prob": answer.log_prob, "tokens": answer.tokens, "latency_s": answer.latency_s}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A run's totals.

    Attributes:
        model: The model's name in Triton.
        questions: Number of examples, with warm-up and failures.
        failed: Number of examples without an answer.
        em: Exact match in percent of the examples with known answers, failures counted as wrong; None if there are none, or if no question
            was answered.
        f1: F1 in percent, likewise.
        em_at: n -> exact match in percent if an oracle chooses among the best n answers of a beam search; empty without one.
        measured: Number of answers in the times below: those after the warm-up that did not fail.
        wall_s: Seconds from the first request after the warm-up until the last result.
        latencies_s: Seconds of each measured answer, measured by the client.
    """

    model: str
    questions: int
    failed: int
    em: float | None
    measured: int
    wall_s: float
    latencies_s: tuple[float, ...] = dataclasses.field(repr=False)
    f1: float | None = None
    em_at: Mapping[int, float | None] = dataclasses.field(default_factory=dict)

    @property
    def questions_per_s(self) -> float | None:
        """Answers per second of wall clock; None if nothing was measured."""
        return self.measured / self.wall_s if self.measured else None

    def latency_s(self, percent: float) -> float | None:
        """A percentile of the measured latencies; None if nothing was measured."""
        return percentile(self.latencies_s, percent) if self.latencies_s else None

    def as_json(self) -> dict[str, Any]:
        """The line that `--json` prints: em in percent, times in milliseconds, null for what was not measured."""
        return {
            "model": self.model,
            "questions": self.questions,
            "em": _rounded(self.em, 2),
            "f1": _rounded(self.f1, 2),
            "questions_per_s": _rounded(self.questions_per_s, 3),
            "p50_ms": _rounded(self.latency_s(50), 3, scale=1000),
            "p99_ms": _rounded(self.latency_s(99), 3, scale=1000),
            "failed": self.failed,
            **{f"em_at_{n}": _rounded(percent, 2) for n, percent in self.em_at.items()},
        }


def evaluate(
    client: ReaderClient,
    examples: Sequence[Example],
    *,
    concurrency: int = 8,
    warmup: int = 0,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    on_prediction: Callable[[Prediction], None] = lambda prediction: None,
) -> Evaluation:
    """Ask every example once.

    Args:
        client: Of the reader.
        examples: The questions.
        concurrency: Requests in flight.
        warmup: Number of first examples that are asked and scored like the others, but end before the timed part starts.
        max_new_tokens: Maximum number of answer tokens; None: the server's default.
        num_beams: Beams of a beam search, all of whose answers are asked for; None: greedy answers.
        on_prediction: Called with each prediction, in the order of the examples.

    Raises:
        ReaderUnavailable: If the server goes away: a request failed, and then the reader was not ready.
    """
    if warmup < 0:
        raise ValueError(f"warmup: wanted a number of examples from 0, got {warmup}")

    def ask(part: Sequence[Example]) -> list[Prediction]:
        return [_reported(prediction, on_prediction) for prediction in _predictions(client, part, concurrency, max_new_tokens, num_beams)]

    warm = ask(examples[:warmup])
    start_s = time.perf_counter()
    timed = ask(examples[warmup:])
    wall_s = time.perf_counter() - start_s

    predictions = warm + timed
    answered = any(prediction.answer is not None for prediction in predictions)
    latencies_s = tuple(prediction.answer.latency_s for prediction in timed if prediction.answer is not None)
    return Evaluation(
        model=client.endpoint.model,
        questions=len(examples),
        failed=sum(prediction.answer is None for prediction in predictions),
        em=_mean_percent([prediction.em for prediction in predictions]) if answered else None,
        measured=len(latencies_s),
        wall_s=wall_s,
        latencies_s=latencies_s,
        f1=_mean_percent([prediction.f1 for prediction in predictions]) if answered else None,
        em_at={n: _mean_percent([p.em_at(n) for p in predictions]) if answered else None for n in N_BEST if n <= (num_beams or 0)},
    )


def agreement(first: Sequence[Prediction], second: Sequence[Prediction]) -> tuple[int, int]:
    """How many questions both readers answered, and to how many of these they gave the same answer, normalized as for exact match."""
    both = [(one.answer.text, two.answer.text) for one, two in zip(first, second) if one.answer is not None and two.answer is not None]
    return len(both), sum(normalize_answer(one) == normalize_answer(two) for one, two in both)


def _mean_percent(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return 100 * sum(known) / len(known) if known else None


def _predictions(
    client: ReaderClient, examples: Sequence[Example], concurrency: int, max_new_tokens: int | None, num_beams: int | None
) -> Iterable[Prediction]:
    requests = (
        ReaderRequest(
            example.question,
            [context.as_passage() for context in example.contexts],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_answers=num_beams,
        )
        for example in examples
    )
    for example, result in zip(examples, client.answer_many(requests, concurrency)):
        if isinstance(result, ReaderUnavailable) and not client.is_ready():
            raise result
        if isinstance(result, ReaderError):
            yield Prediction(example.id, example.question, example.answers, answer=None, error=str(result))
        else:
            yield Prediction(example.id, example.question, example.answers, answer=result)


def _reported(prediction: Prediction, on_prediction: Callable[[Prediction], None]) -> Prediction:
    on_prediction(prediction)
    return prediction


def _rounded(value: float | None, digits: int, *, scale: float = 1) -> float | None:
    return None if value is None else round(value * scale, digits)
