"""Searches of one question: the logits of its sequences go in, the tokens that they continue with and the finished answers come out.

BeamSearch is that of transformers' `generate(num_beams=..., early_stopping=False)`, its default: the answers, their scores and their order
are equal. A step looks at the 2 * num_beams best continuations of all beams. Those among the first num_beams that end become answers, with
the score `log_prob / tokens ** length_penalty`; the best of those that go on become the beams. The search ends when no beam can be better
than the worst of num_beams answers, by the score that it has at its present length. Where only some answers are allowed, beams follow the
trie of their tokens: it is then the search of `generate(prefix_allowed_tokens_fn=...)`.

ChoiceScoring looks at all allowed answers in place of the best beams. Knows neither the scheduler nor a decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .request import ReaderRequest, RequestError

IMPOSSIBLE = np.float32(-1e9)  # the log-probability of a beam that nothing may continue


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished answer, the end token included if it ended by itself.

    `score`: what answers are ordered by; for ChoiceScoring the log-probability of this answer among the allowed ones. `choice`: its index
    among the allowed answers.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    log_prob: float
    score: float
    choice: int | None = None


class Search(Protocol):
    """The state of one search.

    Attributes:
        num_beams: sequences that it decodes together at most.
        position: tokens that each sequence has behind it; equal for all of them.
        last_tokens: int32[sequences], what each sequence is to continue from; set by `advance`.
        parents: int[sequences], which sequence of the step before each one continues.
    """

    num_beams: int
    last_tokens: np.ndarray
    parents: np.ndarray

    @property
    def position(self) -> int: ...  # noqa: D102

    def advance(self, logits: np.ndarray) -> bool:
        """Take the logits of every sequence, float32[sequences, vocab_size]; whether the search has ended.

        Raises:
            FloatingPointError: if a logit is not a number: an answer of arbitrary tokens would follow.
        """
        ...

    def hypotheses(self) -> list[Hypothesis]:
        """The answers, the best first; complete once the search has ended."""
        ...


class BeamSearch:
    """The state of one beam search: see Search.

    Args:
        num_beams: from 1.
        length_penalty: of the score; 0 = the log-probability alone, positive = in favour of long answers.
        max_new_tokens: tokens of an answer at most.
        eos_token: ends an answer.
        allowed: the tokens of each allowed answer, the end token last; none = any answer. As answers of other lengths than the beams' may
            be best, fewer than num_beams of them may be found, but always one.
    """

    def __init__(
        self,
        num_beams: int,
        length_penalty: float,
        max_new_tokens: int,
        eos_token: int,
        start_token: int,
        allowed: Sequence[tuple[int, ...]] = (),
    ):
        self.num_beams = num_beams
        self._choices = {tokens: index for index, tokens in enumerate(allowed)}
        self._nodes = [_trie(allowed)] * num_beams  # of each beam: where it is in the trie
        self._length_penalty, self._max_new_tokens, self._eos_token = length_penalty, max_new_tokens, eos_token
        self.last_tokens = np.full(num_beams, start_token, np.int32)
        self.parents = np.arange(num_beams)
        self._totals = np.full(num_beams, IMPOSSIBLE, np.float32)
        self._totals[0] = 0  # at first all beams are the same: one of them counts
        self._tokens: list[tuple[int, ...]] = [()] * num_beams
        self._log_probs: list[tuple[float, ...]] = [()] * num_beams
        self._finished: list[Hypothesis] = []

    @property
    def position(self) -> int:
        """As Search.position."""
        return len(self._tokens[0])

    def advance(self, logits: np.ndarray) -> bool:
        """Continue every beam by one token; as Search.advance."""
        log_probs = self._allowed(_log_softmax(logits))
        totals = (log_probs + self._totals[:, None]).reshape(-1)
        best = _largest(totals, 2 * self.num_beams)
        beams, tokens = np.divmod(best, logits.shape[1])
        length = len(self._tokens[0]) + 1
        ends = (tokens == self._eos_token) | (length >= self._max_new_tokens)
        divisor = length**self._length_penalty
        for place in np.flatnonzero(ends[: self.num_beams]):
            beam, token, total = int(beams[place]), int(tokens[place]), float(totals[best[place]])
            if total <= IMPOSSIBLE / 2:
                continue
            found, answer = (*self._log_probs[beam], float(log_probs[beam, token])), (*self._tokens[beam], token)
            self._finished.append(Hypothesis(answer, found, total, total / divisor, self._choices.get(answer)))
        # stable: of equal scores the earlier answer stays ahead
        self._finished = sorted(self._finished, key=lambda hypothesis: -hypothesis.score)[: self.num_beams]
        if ends.all():
            return True
        kept = np.flatnonzero(~ends)[: self.num_beams]
        self.parents, self.last_tokens = beams[kept], tokens[kept].astype(np.int32)
        self._log_probs = [
            (*self._log_probs[b], float(log_probs[b, t])) for b, t in zip(self.parents.tolist(), self.last_tokens.tolist(), strict=True)
        ]
        self._tokens = [(*self._tokens[b], t) for b, t in zip(self.parents.tolist(), self.last_tokens.tolist(), strict=True)]
        self._nodes = [self._nodes[b].get(t, {}) for b, t in zip(self.parents.tolist(), self.last_tokens.tolist(), strict=True)]
        self._totals = totals[best[kept]]
        if self._totals[0] <= IMPOSSIBLE / 2:
            return True
        return len(self._finished) == self.num_beams and float(self._totals[0]) / divisor <= self._finished[-1].score

    def hypotheses(self) -> list[Hypothesis]:
        """The answers, the best first: num_beams of them, or as many as the vocabulary and max_new_tokens allow."""
        return self._finished

    def _allowed(self, log_probs: np.ndarray) -> np.ndarray:
        """The log-probabilities, IMPOSSIBLE for every token that no allowed answer goes on with."""
        if not self._choices:
            return log_probs
        allowed = np.full_like(log_probs, IMPOSSIBLE)
        for beam, node in enumerate(self._nodes):
            tokens = np.fromiter(node, np.intp, len(node))
            allowed[beam, tokens] = log_probs[beam, tokens]
        return allowed


@dataclasses.dataclass(frozen=True)
class _Level:
    """One step of ChoiceScoring: the sequences to decode, and what to read of each choice: (choice, sequence, token)."""

    last_tokens: np.ndarray
    parents: np.ndarray
    reads: list[tuple[int, int, int]]
    position: int


class ChoiceScoring:
    """The log-probability of every allowed answer, as full passes over each of them give it: see Search.

    Answers that begin alike share sequences. `num_beams` answers are scored at a time: then the next ones begin at the start token.

    Args:
        choices: the tokens of each answer, the end token last and nowhere else.
        most_beams: sequences that may be decoded together.
        start_token: fed to the decoder at position 0.
    """

    def __init__(self, choices: Sequence[tuple[int, ...]], most_beams: int, start_token: int):
        self._choices = choices
        order = sorted(range(len(choices)), key=lambda choice: choices[choice])
        groups = [order[first : first + most_beams] for first in range(0, len(order), most_beams)]
        self._levels = [level for group in groups for level in _levels({c: choices[c] for c in group}, start_token)]
        self.num_beams = max(len(level.last_tokens) for level in self._levels)
        self._log_probs: list[list[float]] = [[] for _ in choices]
        self._begin(0)

    @property
    def position(self) -> int:
        """As Search.position."""
        return self._levels[self._step].position

    def _begin(self, step: int) -> None:
        self._step = step
        self.last_tokens, self.parents = self._levels[step].last_tokens, self._levels[step].parents

    def advance(self, logits: np.ndarray) -> bool:
        """Read the log-probability of the next token of every answer of this step; as Search.advance."""
        log_probs = _log_softmax(logits)
        for choice, sequence, token in self._levels[self._step].reads:
            self._log_probs[choice].append(float(log_probs[sequence, token]))
        if self._step + 1 == len(self._levels):
            return True
        self._begin(self._step + 1)
        return False

    def hypotheses(self) -> list[Hypothesis]:
        """All answers, the most probable first; of equal ones the earlier choice."""
        totals = np.array([sum(log_probs) for log_probs in self._log_probs])
        scores = _log_softmax(totals[None])[0].tolist()
        found = [
            Hypothesis(tokens, tuple(log_probs), float(total), score, choice)
            for choice, (tokens, log_probs, total, score) in enumerate(zip(self._choices, self._log_probs, totals, scores, strict=True))
        ]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)


def search_of(
    request: ReaderRequest,
    answer_ids: Callable[[Sequence[str]], list[tuple[int, ...]]],
    *,
    most_beams: int,
    eos_token: int,
    start_token: int,
) -> Search | None:
    """The search that a request asks for; None for a greedy answer.

    Args:
        request: checked.
        answer_ids: the tokens of answers, the end token included (PromptEncoder.answer_ids).
        most_beams: sequences of one question that the reader decodes together.
        eos_token: ends an answer.
        start_token: fed to the decoder at position 0.

    Raises:
        RequestError: naming each allowed answer that the reader cannot give.
    """
    beams, choices, allowed = request.beams, request.choices, []
    if choices is not None:
        allowed = answer_ids(choices.answers)
        _require_distinct_answers(allowed, request.max_new_tokens, eos_token)
        if beams is None:
            return ChoiceScoring(allowed, most_beams, start_token)
    if beams is None:
        return None
    return BeamSearch(beams.num_beams, beams.length_penalty, request.max_new_tokens, eos_token, start_token, allowed)


def _require_distinct_answers(allowed: Sequence[tuple[int, ...]], max_new_tokens: int, eos_token: int) -> None:
    faults, seen = [], dict[tuple[int, ...], int]()
    for index, tokens in enumerate(allowed):
        where, same = f"allowed_answers[{index}]", seen.setdefault(tokens, index)
        if len(tokens) > max_new_tokens:
            faults.append(f"{where}: wanted at most max_new_tokens={max_new_tokens} tokens, the end token included, got {len(tokens)}")
        elif eos_token in tokens[:-1]:
            faults.append(f"{where}: wanted no end token in it, got one; leave it out")
        elif len(tokens) == 1:
            faults.append(f"{where}: wanted text that the reader can spell, got no token; leave it out")
        elif same != index:
            faults.append(f"{where}: wanted an answer of its own, got the tokens of allowed_answers[{same}]; leave one of them out")
    if faults:
        raise RequestError.of(faults)


def _trie(answers: Sequence[tuple[int, ...]]) -> dict[int, Any]:
    """Token -> what may follow it, in the same form."""
    root: dict[int, Any] = {}
    for tokens in answers:
        node = root
        for token in tokens:
            node = node.setdefault(token, {})
    return root


def _levels(choices: dict[int, tuple[int, ...]], start_token: int) -> list[_Level]:
    """The steps that score these choices together: choice -> its tokens, the end token last."""
    levels: list[_Level] = []
    before: dict[tuple[int, ...], int] = {}
    for position in range(max(map(len, choices.values()))):
        sequences: dict[tuple[int, ...], int] = {}
        reads = []
        for choice, tokens in choices.items():
            if len(tokens) > position:
                sequence = sequences.setdefault(tokens[:position], len(sequences))
                reads.append((choice, sequence, tokens[position]))
        last = [prefix[-1] if prefix else start_token for prefix in sequences]
        parents = [before[prefix[:-1]] if prefix else 0 for prefix in sequences]
        levels.append(_Level(np.array(last, np.int32), np.array(parents, np.intp), reads, position))
        before = sequences
    return levels


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    if np.isnan(result[:, 0]).any():
        raise FloatingPointError("the decoder's log-probability is not a number")
    return result


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, the largest first; of equal values the first comes first."""
    count = min(count, len(values))
    found = np.sort(np.argpartition(values, len(values) - count)[-count:])
    return found[np.argsort(-values[found], kind="stable")]
