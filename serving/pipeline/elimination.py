"""Token elimination: after some tokens of the answer, a question goes on with the encoder tokens that its cross-attention weighs most.

Comes in: the cross-attention of each step. Goes out: the encoder tokens to keep. The filter is that of arXiv 2310.13682 (section 3.2); it
needs no training. Knows nothing of caches: Decoder.keep does what it says.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class EliminationOptions:
    """What a request asks for.

    Attributes:
        drop_after: tokens of the answer that are generated from all encoder tokens, at least 1.
        keep_encoder_tokens: share of the encoder tokens that stay then, above 0; 1 = all.
        keep_passages: passages that stay then, with all their tokens; None = all. Both together: the share is of what is left of them.
    """

    drop_after: int = 1
    keep_encoder_tokens: float = 1.0
    keep_passages: int | None = None


class Elimination:
    """The cross-attention that one question's encoder tokens have got so far.

    A token's mass is its cross-attention summed over the heads and averaged over the layers that cross-attend, as the decoder gives it. A
    step counts as much as any other: its mass is divided by its sum, so that no batch mate can change it.

    Args:
        options: of the request.
        passage_lengths: int[n_passages], encoder tokens of each passage, in the order of the packed sequence.
    """

    def __init__(self, options: EliminationOptions, passage_lengths: np.ndarray):
        self._options, self._lengths = options, np.asarray(passage_lengths)
        self._mass = np.zeros(int(self._lengths.sum()))
        self._steps = 0

    def kept_after(self, attention: np.ndarray) -> np.ndarray | None:
        """Add a step; return what is kept from the next one on, once, if that is not everything.

        Args:
            attention: float32[encoder_sequence_length] of the step. Ignored once tokens were dropped.

        Returns:
            int[kept], indices into the packed sequence in ascending order, or None.
        """
        self._steps += 1
        if self._steps > self._options.drop_after:
            return None
        mass = attention.astype(np.float64)
        self._mass += mass / mass.sum()
        if self._steps < self._options.drop_after:
            return None
        kept = self._of_best_passages()
        count = max(1, math.ceil(self._options.keep_encoder_tokens * len(kept)))
        best = np.argsort(-self._mass[kept], kind="stable")[:count]
        kept = kept[np.sort(best)]
        return kept if len(kept) < len(self._mass) else None

    def _of_best_passages(self) -> np.ndarray:
        """Indices of the tokens of the passages with most mass."""
        passages = np.repeat(np.arange(len(self._lengths)), self._lengths)
        if self._options.keep_passages is None:
            return np.arange(len(passages))
        mass = np.bincount(passages, self._mass, len(self._lengths))
        best = np.argsort(-mass, kind="stable")[: self._options.keep_passages]
        return np.flatnonzero(np.isin(passages, best))
