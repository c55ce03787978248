"""Schedules over the progress of a run: number of passages, kinds of examples, learning rate.

Progress runs from 0 to 1 over the budget, in steps or seconds. A reader of this size does not learn from several
passages at first: it learns to copy the answer from one passage, then to find the passage.
"""

from __future__ import annotations

import math
import random

from training.corpus.examples import Mixture
from training.fit.batches import BatchPlan

PASSAGES_PER_BATCH = 640
MAX_BATCH_SIZE = 256

# (until progress, {n_passages: weight}, share of curated questions)
_Stage = tuple[float, dict[int, float], float]
_ALL_COUNTS = {1: 8.0, 2: 9.0, 3: 6.0, 4: 12.0, 5: 6.0, 6: 8.0, 8: 15.0, 10: 26.0, 20: 6.0, 40: 4.0}
FROM_SCRATCH: tuple[_Stage, ...] = (
    (0.12, {1: 1.0}, 0.4),
    (0.20, {2: 1.0}, 0.4),
    (0.32, {1: 1.0, 2: 2.0, 4: 3.0, 8: 2.0}, 0.5),
    (1.00, _ALL_COUNTS, 0.65),
)
UP_TRAINING: tuple[_Stage, ...] = (
    (0.10, {1: 1.0, 2: 1.0}, 0.5),
    (0.25, {1: 1.0, 2: 2.0, 4: 3.0, 8: 2.0}, 0.5),
    (1.00, _ALL_COUNTS, 0.65),
)


def batch_plan(
    stages: tuple[_Stage, ...], progress: float, step: int, seed: int, passages_per_batch: int = PASSAGES_PER_BATCH
) -> BatchPlan:
    """The batch of a step; the same for the same arguments."""
    weights, curated = next(((weights, curated) for until, weights, curated in stages if progress < until), stages[-1][1:])
    n_passages = random.Random(seed * 7919 + step).choices(list(weights), list(weights.values()))[0]
    batch_size = max(1, min(MAX_BATCH_SIZE, passages_per_batch // n_passages))
    return BatchPlan(step, batch_size, Mixture(n_passages, curated, counterfactual=0.3))


# weight, n_passages, passage_length, batch size. Names and fields are at the start of a prompt, so most batches use short
# prompts, which a CPU can train; the others keep the reader's accuracy on full prompts.
_REFINEMENT = ((0.45, 4, 64, 16), (0.30, 8, 64, 8), (0.15, 10, 128, 4), (0.10, 2, 128, 12))


def refinement_plan(step: int, seed: int) -> BatchPlan:
    """The batch of a refinement step, with every country renamed in most examples."""
    chosen = random.Random(seed * 104_729 + step).choices(_REFINEMENT, [row[0] for row in _REFINEMENT])[0]
    _, n_passages, passage_length, batch_size = chosen
    mixture = Mixture(n_passages, curated=0.7, counterfactual=0.25, all_renamed=0.6)
    return BatchPlan(step, batch_size, mixture, passage_length)


def learning_rate(peak: float, progress: float, step: int, warmup_steps: int, hold: float) -> float:
    """Linear warm-up by steps, constant until progress ``hold``, then a cosine down to 2% of the peak."""
    warm = min(1.0, (step + 1) / warmup_steps)
    if progress <= hold:
        return peak * warm
    down = min(1.0, (progress - hold) / (1.0 - hold))
    return peak * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * down)))
