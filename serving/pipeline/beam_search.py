"""Beam search of one question: the logits of its beams go in, the tokens that they continue with and the finished answers come out.

The search is that of transformers' `generate(num_beams=..., early_stopping=False)`, its default: the answers, their scores and their order
are equal. A step looks at the 2 * num_beams best continuations of all beams. Those among the first num_beams that end become answers, with
the score `log_prob / tokens ** length_penalty`; the best of those that go on become the beams. The search ends when no beam can be better
than the worst of num_beams answers, by the score that it has at its present length. Knows neither the scheduler nor a decoder.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .request import ReaderRequest

IMPOSSIBLE = np.float32(-1e9)  # the log-probability of a beam that nothing may continue


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished answer, the end token included if it ended by itself."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    log_prob: float
    score: float


class BeamSearch:
    """The state of one search.

    Args:
        num_beams: from 1.
        length_penalty: of the score; 0 = the log-probability alone, positive = in favour of long answers.
        max_new_tokens: tokens of an answer at most.
        eos_token: ends an answer.

    Attributes:
        last_tokens: int32[num_beams], what each beam is to continue from; set by `advance`.
        parents: int[num_beams], which beam of the step before each beam continues.
    """

    def __init__(self, num_beams: int, length_penalty: float, max_new_tokens: int, eos_token: int, start_token: int):
        self.num_beams = num_beams
        self._length_penalty, self._max_new_tokens, self._eos_token = length_penalty, max_new_tokens, eos_token
        self.last_tokens = np.full(num_beams, start_token, np.int32)
        self.parents = np.arange(num_beams)
        self._totals = np.full(num_beams, IMPOSSIBLE, np.float32)
        self._totals[0] = 0  # at first all beams are the same: one of them counts
        self._tokens: list[tuple[int, ...]] = [()] * num_beams
        self._log_probs: list[tuple[float, ...]] = [()] * num_beams
        self._finished: list[Hypothesis] = []

    def advance(self, logits: np.ndarray) -> bool:
        """Continue every beam by one token.

        Args:
            logits: float32[num_beams, vocab_size].

        Returns:
            Whether the search has ended.

        Raises:
            FloatingPointError: if a logit is not a number: an answer of arbitrary tokens would follow.
        """
        log_probs = _log_softmax(logits)
        if np.isnan(log_probs[:, 0]).any():
            raise FloatingPointError("the decoder's log-probability is not a number")
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
            found = (*self._log_probs[beam], float(log_probs[beam, token]))
            self._finished.append(Hypothesis((*self._tokens[beam], token), found, total, total / divisor))
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
        self._totals = totals[best[kept]]
        return len(self._finished) == self.num_beams and float(self._totals[0]) / divisor <= self._finished[-1].score

    def hypotheses(self) -> list[Hypothesis]:
        """The answers, the best first: num_beams of them, or as many as the vocabulary and max_new_tokens allow."""
        return self._finished


def beam_search(request: ReaderRequest, *, eos_token: int, start_token: int) -> BeamSearch | None:
    """The search that a request asks for; None for a greedy answer."""
    beams = request.beams
    if beams is None:
        return None
    return BeamSearch(beams.num_beams, beams.length_penalty, request.max_new_tokens, eos_token, start_token)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, the largest first; of equal values the first comes first."""
    count = min(count, len(values))
    found = np.sort(np.argpartition(values, len(values) - count)[-count:])
    return found[np.argsort(-values[found], kind="stable")]
