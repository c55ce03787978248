"""Batches of examples, prepared by worker processes ahead of the training step.

In: an ExampleSource and BatchPlans. Out: Batches. A batch depends only on seed, step and mixture, so a resumed run continues with the same
batches.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import multiprocessing
import queue
import random
from typing import Any

import numpy as np

from training.corpus.examples import MAX_TARGET_TOKENS, ExampleSource, Mixture


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The batch of step ``step``; ``passage_length`` truncates prompts below the reader's length."""

    step: int
    batch_size: int
    mixture: Mixture
    passage_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids, 0 = pad.

    Attributes:
        input_ids: uint16[batch, n_passages, passage_length].
        targets: uint16[batch, target_length], end token included.
    """

    input_ids: np.ndarray
    targets: np.ndarray


def make_batch(source: ExampleSource, plan: BatchPlan, seed: int) -> Batch:
    """The batch of a step."""
    rng = random.Random(seed * 1_000_003 + plan.step)
    length = plan.passage_length or source.passage_length
    inputs = np.zeros((plan.batch_size, plan.mixture.n_passages, length), dtype=np.uint16)
    targets = np.zeros((plan.batch_size, MAX_TARGET_TOKENS), dtype=np.uint16)
    for row in range(plan.batch_size):
        example = source.draw_fitting(rng, plan.mixture, length) if plan.passage_length else source.draw(rng, plan.mixture)
        for column, prompt in enumerate(source.prompt_ids(example, length)):
            inputs[row, column, : len(prompt)] = prompt
        answer = source.target_ids(example)
        targets[row, : len(answer)] = answer
    return Batch(inputs, targets)


def _work(source: ExampleSource, seed: int, plans: Any, batches: Any) -> None:
    while (plan := plans.get()) is not None:
        batches.put((plan.step, make_batch(source, plan, seed)))


class BatchFactory:
    """Prepares batches in ``num_workers`` processes and returns them in the order of their plans.

    Use it as a context manager. With 0 workers ``next`` prepares the batch in this process.
    Start it before CUDA is initialized: the workers are forks.
    """

    def __init__(self, source: ExampleSource, seed: int, num_workers: int):
        self._source = source
        self._seed = seed
        self._ordered: collections.deque[BatchPlan] = collections.deque()
        self._early: dict[int, Batch] = {}
        context = multiprocessing.get_context("fork")
        self._plans = context.Queue()
        self._batches = context.Queue()
        self._workers = [
            context.Process(target=_work, args=(source, seed, self._plans, self._batches), daemon=True) for _ in range(num_workers)
        ]

    def __enter__(self) -> BatchFactory:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()

    def __len__(self) -> int:
        """Number of batches that are planned and not yet returned."""
        return len(self._ordered)

    def plan(self, plan: BatchPlan) -> None:
        """Queue a batch."""
        self._ordered.append(plan)
        if self._workers:
            self._plans.put(plan)

    def next(self) -> tuple[BatchPlan, Batch]:
        """The next queued batch.

        Raises:
            RuntimeError: If a worker died.
        """
        plan = self._ordered.popleft()
        if not self._workers:
            return plan, make_batch(self._source, plan, self._seed)
        while plan.step not in self._early:
            try:
                step, batch = self._batches.get(timeout=5)
            except queue.Empty:
                dead = [worker.exitcode for worker in self._workers if not worker.is_alive()]
                if dead:
                    raise RuntimeError(f"batch workers: wanted all alive, got exit codes {dead}; see the traceback above") from None
                continue
            self._early[step] = batch
        return plan, self._early.pop(plan.step)


# Schedules over the progress of a run: number of passages, kinds of examples, learning rate.
#
# Progress runs from 0 to 1 over the budget, in steps or seconds. A reader of this size does not learn from several
# passages at first: it learns to copy the answer from one passage, then to find the passage.

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
