"""The scheduler: in-flight batching of sequences over one decoder.

Comes in: encoded questions, from any thread. Goes out: tokens and the finished answer, through the sequence's callbacks, on the scheduler's
thread. Sequences join between two steps when a slot is free and leave when they end. The scheduler knows neither Triton nor what the
decoder (serving/engines/base.py) runs on.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np

from serving.engines.base import Decoder

EOS_FORBIDDEN = -1e9  # added to the end token's logit while an answer must go on
WAITING_CHECKED = 4  # waiting questions asked between two steps whether they were given up


class SchedulerError(RuntimeError):
    """A question that was not taken, or not answered to its end."""


class CancelledError(SchedulerError):
    """The client no longer wants the answer, or its time is over."""


class QueueFullError(SchedulerError):
    """More questions wait than may."""


class SchedulerStoppedError(SchedulerError):
    """The loop was stopped before the answer ended."""


@dataclasses.dataclass(eq=False)
class DecodeSequence:
    """An encoded question and who wants to know.

    Attributes:
        hidden: float[encoder_sequence_length, d_model], valid hidden states of all passages, packed; dropped once admitted.
        encoder_positions: int32[encoder_sequence_length].
        on_token: called with each token and its log-probability, the end token included.
        on_end: called once, last: with None, or with the reason why the answer did not reach its end.
        on_attribution: called once, with the first token's cross-attention, float32[encoder_sequence_length].
        cancel_reason: asked between steps: None, or why the answer is no longer wanted. The slot is freed then.
    """

    hidden: np.ndarray | None
    encoder_positions: np.ndarray
    max_new_tokens: int
    min_new_tokens: int
    on_token: Callable[[int, float], None]
    on_end: Callable[[Exception | None], None]
    on_attribution: Callable[[np.ndarray], None] = lambda attention: None
    cancel_reason: Callable[[], str | None] = lambda: None
    generated: int = 0
    last_token: int = 0


@dataclasses.dataclass
class SchedulerCounts:
    """What the loop has done and is doing; read by the metrics."""

    steps: int = 0
    step_s: float = 0.0
    tokens: int = 0
    running: int = 0
    waiting: int = 0
    encoder_tokens: int = 0


class Scheduler:
    """Runs a decoder engine on a thread of its own."""

    def __init__(self, engine: Decoder, *, start_token: int, eos_token: int, max_waiting: int):
        self._engine, self._start_token, self._eos_token, self._max_waiting = engine, start_token, eos_token, max_waiting
        self._waiting: collections.deque[DecodeSequence] = collections.deque()
        self._slots: list[DecodeSequence | None] = []  # the question in each slot; None where one has just left
        self._changed = threading.Condition()
        self._counts = SchedulerCounts()
        self._checked = 0  # how far into the queue we have looked for questions given up
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)
        self._thread.start()

    def submit(self, question: DecodeSequence) -> None:
        """Queue a question, first come first served.

        Raises:
            QueueFullError: if as many wait as may.
            SchedulerStoppedError: after `stop`.
        """
        with self._changed:
            if self._stopping:
                raise SchedulerStoppedError("the server is shutting down")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{len(self._waiting)} questions are waiting and no more may; try again later")
            self._waiting.append(question)
            self._changed.notify()

    def stop(self) -> None:
        """End the loop; whatever has not ended is told SchedulerStoppedError."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._drop_cancelled()
            self._admit()
            self._compact_slots()
            if self._slots:
                self._step()
        with self._changed:
            left = [question for question in (*self._slots, *self._waiting) if question is not None]
            self._waiting.clear()
        for question in left:
            question.on_end(SchedulerStoppedError("the server is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._slots)
            return not self._stopping

    def counts(self) -> SchedulerCounts:
        """A copy of the counts; running and waiting are those of this moment."""
        running = [question for question in list(self._slots) if question is not None]
        tokens = sum(len(question.encoder_positions) for question in running)
        return dataclasses.replace(self._counts, running=len(running), waiting=len(self._waiting), encoder_tokens=tokens)

    def _drop_cancelled(self) -> None:
        """Free the slots of answers nobody wants, and look through part of the queue, so that the dead do not hold its places."""
        for slot, question in enumerate(self._slots):
            if question is not None and (reason := question.cancel_reason()):
                self._release_slot(slot, CancelledError(reason))
        with self._changed:
            self._checked = self._checked % len(self._waiting) if self._waiting else 0
            some = list(itertools.islice(self._waiting, self._checked, self._checked + WAITING_CHECKED))
        self._checked += len(some)
        for question in some:
            if reason := question.cancel_reason():
                with self._changed:
                    self._waiting.remove(question)
                question.on_end(CancelledError(reason))

    def _admit(self) -> None:
        while (slot := self._free_slot()) is not None:
            with self._changed:
                if not self._waiting:
                    return
                question = self._waiting.popleft()
            if reason := question.cancel_reason():
                question.on_end(CancelledError(reason))
                continue
            hidden, question.hidden = question.hidden, None
            question.last_token = self._start_token
            try:
                assert hidden is not None
                self._engine.admit(slot, len(self._slots), hidden, question.encoder_positions)
            except Exception as error:
                question.on_end(error)
                continue
            self._slots[slot : slot + 1] = [question]

    def _free_slot(self) -> int | None:
        if None in self._slots:
            return self._slots.index(None)
        return len(self._slots) if len(self._slots) < self._engine.slots else None

    def _compact_slots(self) -> None:
        """Move the last answers into slots that nobody took over: a step works on one block of slots."""
        while None in self._slots:
            gap, last = self._slots.index(None), len(self._slots) - 1
            if self._slots[last] is not None:
                self._engine.move(last, gap)
                self._slots[gap] = self._slots[last]
            self._slots.pop()

    def _step(self) -> None:
        running = [question for question in self._slots if question is not None]
        tokens = np.array([q.last_token for q in running], np.int32)
        positions = np.array([q.generated for q in running], np.int32)
        eos_penalty = np.array([EOS_FORBIDDEN if q.generated < q.min_new_tokens - 1 else 0.0 for q in running], np.float32)
        started = time.perf_counter()
        try:
            next_tokens, log_probs, attention = self._engine.step(tokens, positions, eos_penalty)
        except Exception as error:  # the engine is shared: every answer in this step is lost, the loop is not
            for slot in range(len(self._slots)):
                self._release_slot(slot, error)
            return
        self._counts.steps += 1
        self._counts.step_s += time.perf_counter() - started
        self._counts.tokens += len(running)
        for slot, (question, token, log_prob) in enumerate(zip(running, next_tokens.tolist(), log_probs.tolist(), strict=True)):
            if not question.generated:
                question.on_attribution(attention[slot, : len(question.encoder_positions)])
            question.last_token = token
            question.generated += 1
            question.on_token(token, log_prob)
            if token == self._eos_token or question.generated >= question.max_new_tokens:
                self._release_slot(slot, None)

    def _release_slot(self, slot: int, error: Exception | None) -> None:
        question = self._slots[slot]
        self._slots[slot] = None
        if question is not None:
            question.on_end(error)
