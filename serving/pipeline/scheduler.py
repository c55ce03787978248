"""The scheduler: in-flight batching of sequences over one decoder.

Comes in: encoded questions, from any thread. Goes out: tokens and the end of each sequence, through the sequence's callbacks, on the
scheduler's thread. Sequences join between two steps when a slot is free and leave when they end. A sequence with beam search (see
beam_search.py) holds as many of the decoder's slots as it has beams, and shares every step with the others. The scheduler knows neither
Triton nor what the decoder (serving/engines/base.py) runs on.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from serving.engines.base import BeamDecoder, Decoder, DroppingDecoder

from .beam_search import Hypothesis, Search
from .elimination import Elimination

EOS_FORBIDDEN = -1e9  # added to the end token's logit while a sequence must go on
GREEDY_PARENT = np.zeros(1, np.intp)  # a greedy sequence goes on from itself
WAITING_CHECKED = 4  # waiting sequences that are checked for cancellation between two steps


class SchedulerError(RuntimeError):
    """A sequence that was not accepted, or did not reach its end."""


class CancelledError(SchedulerError):
    """The client cancelled the request or left."""


class DeadlineExceededError(SchedulerError):
    """The request's own time limit passed."""


class QueueFullError(SchedulerError):
    """As many questions wait as may."""


class SchedulerStoppedError(SchedulerError):
    """The scheduler was stopped, or failed, before the sequence ended."""


@dataclasses.dataclass(eq=False)
class DecodeSequence:
    """An encoded question and the callbacks of whoever asked it.

    An exception of a callback ends this sequence and no other.

    Attributes:
        hidden: float[encoder_sequence_length, d_model], valid hidden states of all passages, packed; dropped once admitted.
        encoder_positions: int32[encoder_sequence_length].
        on_token: called with each token and its log-probability, the end token included. Not called with beam search.
        on_end: called once, last: with None, or with the reason why the sequence did not reach its end.
        on_admitted: called once, when the sequence has a slot.
        on_attribution: called once, with the first token's cross-attention, float32[encoder_sequence_length].
        cancel_reason: called between steps: None, or the error to end the sequence with.
        search: the search of the sequence; None = greedy.
        on_hypotheses: called once with the answers of the search, the best first.
        elimination: says which encoder tokens are dropped on the way; None = none. Not together with a search.
    """

    hidden: np.ndarray | None
    encoder_positions: np.ndarray
    max_new_tokens: int
    min_new_tokens: int
    on_token: Callable[[int, float], None]
    on_end: Callable[[Exception | None], None]
    on_attribution: Callable[[np.ndarray], None] = lambda attention: None
    cancel_reason: Callable[[], Exception | None] = lambda: None
    on_admitted: Callable[[], None] = lambda: None
    search: Search | None = None
    on_hypotheses: Callable[[list[Hypothesis]], None] = lambda hypotheses: None
    elimination: Elimination | None = None
    generated: int = 0
    last_token: int = 0

    @property
    def beams(self) -> int:
        """How many of the decoder's slots it holds."""
        return 1 if self.search is None else self.search.num_beams

    @property
    def position(self) -> int:
        """Tokens in its self-attention cache."""
        return self.generated if self.search is None else self.search.position

    @property
    def rows(self) -> int:
        """Rows of the next step that are its own, at most `beams`."""
        return 1 if self.search is None else len(self.search.last_tokens)


@dataclasses.dataclass
class SchedulerCounts:
    """Totals since the start, and the state of this moment; the metrics read them. `beams`: slots that the running sequences hold."""

    steps: int = 0
    step_s: float = 0.0
    tokens: int = 0
    running: int = 0
    waiting: int = 0
    encoder_tokens: int = 0
    beams: int = 0
    dropped_tokens: int = 0


class Scheduler:
    """Runs a decoder on a thread of its own.

    Args:
        decoder: used by the scheduler's thread only.
        start_token: fed to the decoder at position 0.
        eos_token: ends a sequence.
        max_waiting: sequences that may wait for a slot.
        on_decoder_error: called with each error of the decoder, once the sequences it hurt have ended. The process ends itself there if
            the error is fatal to it (`is_fatal` in serving/engines/base.py).
        on_failure: called with an error that ends the scheduler's thread: an error of its own, which no sequence caused.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        start_token: int,
        eos_token: int,
        max_waiting: int,
        on_decoder_error: Callable[[Exception], None] = lambda error: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):
        self._decoder, self._start_token, self._eos_token, self._max_waiting = decoder, start_token, eos_token, max_waiting
        self._on_decoder_error, self._on_failure = on_decoder_error, on_failure
        self._waiting: collections.deque[DecodeSequence] = collections.deque()
        self._slots: list[DecodeSequence | None] = []  # None = released, and not yet taken or compacted
        self._changed = threading.Condition()
        self._counts = SchedulerCounts()
        self._checked = 0  # how far the queue has been checked for cancelled sequences
        self._stop_reason = ""
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, sequence: DecodeSequence) -> None:
        """Queue a sequence, first come first served.

        Raises:
            QueueFullError: if as many wait as may.
            SchedulerStoppedError: after `stop`, or once the scheduler has failed.
            ValueError: if the sequence has beams and the decoder has none, or fewer slots than beams.
        """
        if sequence.search is not None and not self._decoder.has_beams:
            raise ValueError("num_beams: wanted 1, because this reader's engine decodes greedily, got beam search")
        if sequence.elimination is not None and (sequence.search is not None or not self._decoder.can_drop):
            raise ValueError("elimination: wanted none beside beam search and of an engine that cannot drop encoder tokens")
        if sequence.beams > self._decoder.slots:
            raise ValueError(f"num_beams: wanted at most {self._decoder.slots}, the decoder's slots, got {sequence.beams}")
        with self._changed:
            if self._stop_reason:
                raise SchedulerStoppedError(self._stop_reason)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{len(self._waiting)} questions are waiting and no more may; try again later")
            self._waiting.append(sequence)
            self._changed.notify()

    def stop(self) -> None:
        """Stop the thread; every sequence that has not ended gets SchedulerStoppedError."""
        with self._changed:
            self._stop_reason = self._stop_reason or "the server is shutting down"
            self._changed.notify()
        self._thread.join()

    def counts(self) -> SchedulerCounts:
        """A copy of the counts."""
        running = [sequence for sequence in list(self._slots) if sequence is not None]
        tokens = sum(len(sequence.encoder_positions) for sequence in running)
        beams = sum(sequence.beams for sequence in running)
        return dataclasses.replace(self._counts, running=len(running), waiting=len(self._waiting), encoder_tokens=tokens, beams=beams)

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit_waiting()
                self._compact_slots()
                if self._slots:
                    self._step()
        except BaseException as error:  # an error of the scheduler itself: nobody may wait for answers that never come
            failure = error
        with self._changed:
            self._stop_reason = self._stop_reason or f"the scheduler has failed ({failure!r}); the server is starting again"
            left = [sequence for sequence in (*self._slots, *self._waiting) if sequence is not None]
            self._waiting.clear()
            self._slots.clear()
        for sequence in left:
            self._end(sequence, SchedulerStoppedError(self._stop_reason))
        if failure is not None:
            self._on_failure(failure)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stop_reason or self._waiting or self._slots)
            return not self._stop_reason

    def _drop_cancelled(self) -> None:
        """End running sequences that were cancelled, and check a part of the queue, so that cancelled ones do not fill it."""
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and (reason := self._reason_to_end(sequence)):
                self._release_slot(slot, reason)
        with self._changed:
            self._checked = self._checked % len(self._waiting) if self._waiting else 0
            some = list(itertools.islice(self._waiting, self._checked, self._checked + WAITING_CHECKED))
        self._checked += len(some)
        for sequence in some:
            if reason := self._reason_to_end(sequence):
                with self._changed:
                    self._waiting.remove(sequence)
                self._end(sequence, reason)

    def _admit_waiting(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or (slot := self._free_slot(self._waiting[0].beams)) is None:
                    return  # the first in the queue waits for its beams: nobody overtakes it
                sequence = self._waiting.popleft()
            if reason := self._reason_to_end(sequence):
                self._end(sequence, reason)
                continue
            hidden, sequence.hidden = sequence.hidden, None
            sequence.last_token = self._start_token
            try:
                assert hidden is not None
                sequence.on_admitted()
                arguments = (slot, len(self._slots), hidden, sequence.encoder_positions)
                if sequence.search is None:
                    self._decoder.admit(*arguments)
                else:
                    cast(BeamDecoder, self._decoder).admit(*arguments, sequence.beams)
            except Exception as error:
                self._end(sequence, error)
                self._on_decoder_error(error)
                continue
            self._slots[slot : slot + 1] = [sequence]

    def _free_slot(self, beams: int) -> int | None:
        if sum(0 if sequence is None else sequence.beams for sequence in self._slots) + beams > self._decoder.slots:
            return None
        return self._slots.index(None) if None in self._slots else len(self._slots)

    def _compact_slots(self) -> None:
        """Move the last sequences into released slots that nobody took: a step works on one contiguous block of slots."""
        while None in self._slots:
            gap, last = self._slots.index(None), len(self._slots) - 1
            if self._slots[last] is not None:
                try:
                    self._decoder.move(last, gap)
                    self._slots[gap] = self._slots[last]
                except Exception as error:
                    self._release_slot(last, error)
                    self._on_decoder_error(error)
            self._slots.pop()

    def _step(self) -> None:
        running = [sequence for sequence in self._slots if sequence is not None]
        counts = [s.rows for s in running]
        positions = np.repeat(np.array([s.position for s in running], np.int32), counts)
        eos_penalty = np.array([EOS_FORBIDDEN if s.generated < s.min_new_tokens - 1 else 0.0 for s in running], np.float32)
        with_beams = any(s.search is not None for s in running)
        logits = np.zeros((0, 0), np.float32)
        started = time.perf_counter()
        try:
            if with_beams:
                last = [np.array([s.last_token], np.int32) if s.search is None else s.search.last_tokens for s in running]
                parents = [GREEDY_PARENT if s.search is None else s.search.parents for s in running]
                decoder = cast(BeamDecoder, self._decoder)
                found = decoder.beam_step(np.concatenate(last), positions, np.repeat(eos_penalty, counts), parents)
                next_tokens, log_probs, attention, logits = found
            else:
                tokens = np.array([s.last_token for s in running], np.int32)
                next_tokens, log_probs, attention = self._decoder.step(tokens, positions, eos_penalty)
        except Exception as error:  # the decoder is shared: every sequence of this step is lost, the scheduler goes on
            for slot in range(len(self._slots)):
                self._release_slot(slot, error)
            self._on_decoder_error(error)
            return
        self._counts.steps += 1
        self._counts.step_s += time.perf_counter() - started
        self._counts.tokens += len(next_tokens)
        next_tokens, log_probs = next_tokens.tolist(), log_probs.tolist()
        row = 0
        for slot, (sequence, count) in enumerate(zip(running, counts, strict=True)):
            first, row = row, row + count
            token, log_prob = next_tokens[first], log_probs[first]
            try:
                if not sequence.generated:
                    sequence.on_attribution(attention[slot, : len(sequence.encoder_positions)])
                if sequence.search is not None:
                    sequence.generated += 1
                    if sequence.search.advance(logits[first:row]):
                        sequence.on_hypotheses(sequence.search.hypotheses())
                        self._release_slot(slot, None)
                    continue
                if math.isnan(log_prob):  # an answer of arbitrary tokens would follow
                    raise FloatingPointError("the decoder's log-probability is not a number")
                sequence.last_token = token
                sequence.generated += 1
                sequence.on_token(token, log_prob)
                is_whole = token == self._eos_token or sequence.generated >= sequence.max_new_tokens
                if sequence.elimination is not None and not is_whole:
                    self._eliminate(slot, sequence, attention[slot])
            except Exception as error:
                self._release_slot(slot, error)
                continue
            if is_whole:
                self._release_slot(slot, None)

    def _eliminate(self, slot: int, sequence: DecodeSequence, attention: np.ndarray) -> None:
        """Drop the encoder tokens that the sequence goes on without."""
        assert sequence.elimination is not None
        kept = sequence.elimination.kept_after(attention[: len(sequence.encoder_positions)])
        if kept is not None:
            cast(DroppingDecoder, self._decoder).keep(slot, len(self._slots), kept)
            self._counts.dropped_tokens += len(sequence.encoder_positions) - len(kept)
            sequence.encoder_positions = sequence.encoder_positions[kept]

    def _release_slot(self, slot: int, error: Exception | None) -> None:
        sequence = self._slots[slot]
        self._slots[slot] = None
        if sequence is not None:
            self._end(sequence, error)

    @staticmethod
    def _reason_to_end(sequence: DecodeSequence) -> Exception | None:
        try:
            return sequence.cancel_reason()
        except Exception as error:
            return error

    @staticmethod
    def _end(sequence: DecodeSequence, error: Exception | None) -> Any:
        try:
            sequence.on_end(error)
        except Exception:
            # There is nobody left to inform. The response writer logs errors of its own; the scheduler goes on.
            return
