"""The decode loop alone, driven by a fake engine whose next token depends on everything that a real one's would."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pipeline.scheduler import CancelledError, DecodeSequence, QueueFullError, Scheduler, SchedulerError, SchedulerStoppedError

EOS = 1
START = 0


def next_token(key: int, position: int, token: int, eos_penalty: float) -> int:
    """A hash of the question, how far it is and what it said last; the end token about every sixth time."""
    value = (key * 7919 + position * 104729 + token * 31) % 23
    if value < 4 and eos_penalty == 0:
        return EOS
    return 2 + value


def expected(key: int, most: int, least: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < most:
        penalty = -1e9 if len(tokens) < least - 1 else 0.0
        tokens.append(next_token(key, len(tokens), tokens[-1] if tokens else START, penalty))
        if tokens[-1] == EOS:
            break
    return tokens


class FakeEngine:
    """Keeps in each slot which question it was given, and refuses what a real engine could not do."""

    def __init__(self, slots: int):
        self.slots = slots
        self.has_beams = self.can_drop = False
        self.keys: list[int | None] = [None] * slots
        self.batches: list[int] = []
        self.gate: threading.Event | None = None  # no step before it is set
        self.permits: threading.Semaphore | None = None  # one step each
        self.fail_at: int | None = None

    def admit(self, slot: int, running: int, hidden: np.ndarray, encoder_positions: np.ndarray) -> None:
        assert 0 <= slot <= running and slot < self.slots
        if hidden[0, 0] < 0:
            raise ValueError("no such question")
        self.keys[slot] = int(hidden[0, 0])

    def move(self, source: int, target: int) -> None:
        assert target < source
        self.keys[target], self.keys[source] = self.keys[source], None

    def step(self, tokens, positions, eos_penalty):
        if self.gate is not None:
            self.gate.wait(10)
        if self.permits is not None:
            self.permits.acquire(timeout=10)
        self.batches.append(len(tokens))
        if self.fail_at == len(self.batches):
            raise RuntimeError("engine broke")
        keys = self.keys[: len(tokens)]
        assert None not in keys, "a step over a slot that nobody occupies"
        chosen = [next_token(k, int(p), int(t), float(e)) for k, p, t, e in zip(keys, positions, tokens, eos_penalty, strict=True)]
        attention = np.array([[key, -1.0] for key in keys], np.float32)  # as long as the longest, here one more than each has
        return np.array(chosen, np.int32), np.full(len(tokens), -0.5, np.float32), attention


@dataclasses.dataclass
class Client:
    key: int
    most: int = 8
    least: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    ends: list[Exception | None] = dataclasses.field(default_factory=list)
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    cancelled: bool = False
    attribution: list[np.ndarray] = dataclasses.field(default_factory=list)

    def question(self) -> DecodeSequence:
        def end(error: Exception | None) -> None:
            self.ends.append(error)
            self.done.set()

        hidden = np.full((1, 1), self.key, np.float32)
        return DecodeSequence(
            hidden,
            np.zeros(1, np.int32),
            self.most,
            self.least,
            lambda token, _: self.tokens.append(token),
            end,
            self.attribution.append,
            lambda: CancelledError("cancelled") if self.cancelled else None,
        )


def loop_over(engine: FakeEngine, max_waiting: int = 1000, **hooks) -> Scheduler:
    return Scheduler(engine, start_token=START, eos_token=EOS, max_waiting=max_waiting, **hooks)


CLIENTS = st.lists(
    st.builds(lambda k, m, f: Client(k, m, int(m * f)), st.integers(0, 99), st.integers(1, 20), st.floats(0, 1)), max_size=25
)


@settings(deadline=None, max_examples=60)
@given(CLIENTS, st.integers(1, 6), st.lists(st.booleans(), max_size=25))
def test_every_answer_is_what_it_would_be_alone_whoever_comes_and_goes(clients, slots, pauses):
    loop = loop_over(FakeEngine(slots))
    clients = [Client(c.key, c.most, c.least) for c in clients]
    for i, client in enumerate(clients):
        loop.submit(client.question())
        if i < len(pauses) and pauses[i]:
            time.sleep(0.0005)  # arrivals between steps, not only before the first
    for client in clients:
        assert client.done.wait(10)
        assert client.ends == [None]
        assert client.tokens == expected(client.key, client.most, client.least)
        assert [e.tolist() for e in client.attribution] == [[client.key]]
    loop.stop()
    assert (loop.counts().running, loop.counts().waiting) == (0, 0)


def test_questions_share_steps_and_never_exceed_the_slots():
    engine = FakeEngine(4)
    engine.gate = threading.Event()
    loop = loop_over(engine)
    clients = [Client(key, most=10, least=10) for key in range(9)]
    for client in clients:
        loop.submit(client.question())
    engine.gate.set()
    assert all(client.done.wait(10) for client in clients)
    loop.stop()
    assert max(engine.batches) == 4
    assert len(engine.batches) <= 31  # 9 answers of 10 tokens over 4 slots: three rounds, and one step in which only one had come


def test_a_question_joins_while_others_run():
    engine = FakeEngine(2)
    engine.permits = threading.Semaphore(3)
    loop = loop_over(engine)
    long, late = Client(1, most=20, least=20), Client(2, most=3, least=3)
    loop.submit(long.question())
    while len(long.tokens) < 3:
        time.sleep(0.001)
    loop.submit(late.question())
    engine.permits.release(100)
    assert late.done.wait(10) and long.done.wait(10)
    loop.stop()
    assert 2 in engine.batches and engine.batches[0] == 1 and engine.batches[-1] == 1


def test_cancelled_questions_free_their_slot_and_are_told():
    engine = FakeEngine(1)
    engine.gate = threading.Event()
    loop = loop_over(engine)
    first, waiting, third = Client(1, most=500, least=500), Client(2), Client(3, most=2, least=2)
    for client in (first, waiting, third):
        loop.submit(client.question())
    first.cancelled = waiting.cancelled = True
    engine.gate.set()
    assert all(client.done.wait(10) for client in (first, waiting, third))
    loop.stop()
    assert [str(c.ends[0]) for c in (first, waiting)] == ["cancelled", "cancelled"]
    assert len(first.tokens) <= 1 and waiting.tokens == []
    assert third.tokens == expected(3, 2, 2)


def test_waiting_questions_that_are_given_up_leave_the_queue_while_others_run():
    engine = FakeEngine(1)
    engine.permits = threading.Semaphore(1)
    loop = loop_over(engine)
    running, dead, alive = Client(1, most=30, least=30), [Client(k) for k in range(10)], Client(3, most=2, least=2)
    for client in (running, *dead, alive):
        loop.submit(client.question())
    for client in dead:
        client.cancelled = True
    engine.permits.release(5)
    assert all(client.done.wait(10) for client in dead)
    assert not running.done.is_set() and loop.counts().waiting == 1
    engine.permits.release(100)
    assert alive.done.wait(10) and alive.tokens == expected(3, 2, 2)
    loop.stop()


def test_a_question_that_is_given_up_is_told_from_equal_ones():
    """A sequence holds arrays: compared by value, one would leave the queue for another, or the comparison would fail."""
    engine = FakeEngine(1)
    engine.permits = threading.Semaphore(1)
    loop = loop_over(engine)
    running, alive, dead = Client(1, most=30, least=30), Client(2, most=2, least=2), Client(2, most=2, least=2)
    hidden, positions = np.full((3, 2), 2, np.float32), np.zeros(3, np.int32)
    loop.submit(running.question())
    for client in (alive, dead):
        loop.submit(dataclasses.replace(client.question(), hidden=hidden, encoder_positions=positions))
    dead.cancelled = True
    engine.permits.release(5)
    assert dead.done.wait(10) and isinstance(dead.ends[0], CancelledError) and not alive.done.is_set()
    engine.permits.release(100)
    assert alive.done.wait(10) and alive.ends == [None] and alive.tokens == expected(2, 2, 2)
    loop.stop()


def test_counts_tell_what_runs_waits_and_was_done():
    engine = FakeEngine(2)
    engine.permits = threading.Semaphore(0)
    loop = loop_over(engine)
    assert set(dataclasses.astuple(loop.counts())) == {0}
    clients = [Client(key, most=3, least=3) for key in range(4)]
    for client, n_tokens in zip(clients, (5, 7, 11, 13), strict=True):
        loop.submit(dataclasses.replace(client.question(), encoder_positions=np.zeros(n_tokens, np.int32)))
        deadline = time.monotonic() + 10
        while client in clients[:1] and loop.counts().running < 1 and time.monotonic() < deadline:
            time.sleep(0.001)  # the first one runs before the others come
    counts = loop.counts()
    assert (counts.steps, counts.tokens, counts.running, counts.waiting, counts.encoder_tokens) == (0, 0, 1, 3, 5)
    engine.permits.release()
    while len(engine.batches) < 1 or loop.counts().running < 2:
        time.sleep(0.001)
    counts = loop.counts()
    assert (counts.steps, counts.tokens, counts.running, counts.waiting, counts.encoder_tokens) == (1, 1, 2, 2, 12)
    engine.permits.release(100)
    assert all(client.done.wait(10) for client in clients)
    loop.stop()
    counts = loop.counts()
    assert (counts.steps, counts.tokens) == (len(engine.batches), sum(engine.batches)) == (len(engine.batches), 12)
    assert 0 < counts.step_s < 100
    assert (counts.running, counts.waiting, counts.encoder_tokens) == (0, 0, 0)


def test_a_scheduler_that_nobody_stops_does_not_keep_its_process_alive():
    code = (
        "from types import SimpleNamespace; from serving.pipeline.scheduler import Scheduler\n"
        "Scheduler(SimpleNamespace(slots=1), start_token=0, eos_token=1, max_waiting=1)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_full_queue_refuses_at_once():
    engine = FakeEngine(1)
    engine.gate = threading.Event()
    loop = loop_over(engine, max_waiting=2)
    loop.submit(Client(1).question())
    deadline = time.monotonic() + 5
    while engine.keys[0] is None and time.monotonic() < deadline:
        time.sleep(0.001)
    accepted = [Client(2), Client(3)]
    for client in accepted:
        loop.submit(client.question())
    with pytest.raises(QueueFullError, match="2 questions are waiting"):
        loop.submit(Client(4).question())
    engine.gate.set()
    assert all(client.done.wait(10) for client in accepted)
    loop.stop()


def test_a_question_the_engine_refuses_harms_no_other():
    loop = loop_over(FakeEngine(2))
    bad, good = Client(-1), Client(5)
    loop.submit(bad.question())
    loop.submit(good.question())
    assert bad.done.wait(10) and good.done.wait(10)
    loop.stop()
    assert isinstance(bad.ends[0], ValueError)
    assert good.ends == [None] and good.tokens == expected(5, 8, 0)


def test_a_log_probability_that_is_no_number_ends_its_own_answer_only():
    class Engine(FakeEngine):
        def step(self, tokens, positions, eos_penalty):
            chosen, log_probs, attention = super().step(tokens, positions, eos_penalty)
            log_probs[np.array(self.keys[: len(tokens)]) == 7] = np.nan
            return chosen, log_probs, attention

    loop = loop_over(Engine(2))
    bad, good = Client(7), Client(5)
    loop.submit(bad.question())
    loop.submit(good.question())
    assert bad.done.wait(10) and good.done.wait(10)
    loop.stop()
    assert isinstance(bad.ends[0], FloatingPointError) and bad.tokens == []
    assert good.ends == [None] and good.tokens == expected(5, 8, 0)


def test_a_broken_step_is_told_to_all_in_it_and_the_loop_lives_on():
    engine = FakeEngine(2)
    engine.fail_at = 1
    engine.gate = threading.Event()
    loop = loop_over(engine)
    lost = Client(1)
    loop.submit(lost.question())
    engine.gate.set()
    assert lost.done.wait(10)
    assert str(lost.ends[0]) == "engine broke"
    after = Client(6)
    loop.submit(after.question())
    assert after.done.wait(10) and after.tokens == expected(6, 8, 0)
    loop.stop()


@pytest.mark.parametrize("callback", ["on_token", "on_attribution", "cancel_reason", "on_admitted", "on_end"])
def test_an_exception_of_a_callback_hurts_only_its_own_answer(callback):
    loop = loop_over(FakeEngine(2))
    bad, good = Client(3), Client(5)

    def broken(*_):
        raise ValueError(f"{callback} broke")

    sequence = bad.question()
    setattr(sequence, callback, broken)
    loop.submit(sequence)
    loop.submit(good.question())
    assert good.done.wait(10) and good.ends == [None] and good.tokens == expected(5, 8, 0)
    if callback != "on_end":
        assert bad.done.wait(10) and [str(error) for error in bad.ends] == [f"{callback} broke"]
    later = Client(7)
    loop.submit(later.question())
    assert later.done.wait(10) and later.tokens == expected(7, 8, 0)
    loop.stop()


def test_a_failed_move_hurts_only_the_sequence_that_was_moved():
    engine = FakeEngine(2)
    engine.permits = threading.Semaphore(2)
    errors = []
    loop = loop_over(engine, on_decoder_error=errors.append)
    short, moved = Client(1, most=2, least=2), Client(2, most=50, least=50)

    def move(source, target):
        raise RuntimeError("no room")

    engine.move = move
    loop.submit(short.question())
    loop.submit(moved.question())
    engine.permits.release(100)
    assert short.done.wait(10) and short.ends == [None]
    assert moved.done.wait(10) and [str(error) for error in moved.ends] == ["no room"]
    after = Client(6)
    loop.submit(after.question())
    assert after.done.wait(10) and after.tokens == expected(6, 8, 0)
    loop.stop()
    assert [str(error) for error in errors] == ["no room"]


def test_a_decoder_error_is_reported_once_its_sequences_have_ended():
    engine = FakeEngine(2)
    engine.fail_at = 1
    lost, seen = Client(1), []
    loop = loop_over(engine, on_decoder_error=lambda error: seen.append((str(error), lost.done.is_set())))
    loop.submit(lost.question())
    assert lost.done.wait(10)
    loop.stop()
    assert seen == [("engine broke", True)]


def test_a_scheduler_that_fails_ends_every_sequence_refuses_more_and_says_so():
    engine = FakeEngine(1)
    engine.gate = threading.Event()
    failures: list[BaseException] = []
    loop = loop_over(engine, on_failure=failures.append)
    running, waiting = Client(1, most=500, least=500), Client(2)
    loop.submit(running.question())
    loop.submit(waiting.question())
    engine.step = lambda *_: (np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, 1), np.float32))  # too few: a fault of its own
    engine.gate.set()
    assert running.done.wait(10) and waiting.done.wait(10)
    assert all(isinstance(client.ends[-1], SchedulerStoppedError) for client in (running, waiting))
    with pytest.raises(SchedulerStoppedError, match="the scheduler has failed"):
        loop.submit(Client(3).question())
    loop.stop()
    assert len(failures) == 1


def test_stopping_tells_everyone_and_takes_no_more():
    engine = FakeEngine(1)
    engine.gate = threading.Event()
    loop = loop_over(engine)
    clients = [Client(k, most=100, least=100) for k in range(3)]
    for client in clients:
        loop.submit(client.question())
    threading.Timer(0.05, engine.gate.set).start()
    loop.stop()
    assert all(isinstance(client.ends[0], SchedulerStoppedError) and len(client.ends) == 1 for client in clients)
    with pytest.raises(SchedulerError, match="shutting down"):
        loop.submit(Client(9).question())
