"""Batches of examples, prepared by worker processes ahead of the training step.

In: an ExampleSource and BatchPlans. Out: Batches. A batch depends only on seed, step and mixture, so a resumed run continues with the same
batches.
"""

from __future__ import annotations

import collections
import dataclasses
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
