"""Counts and gauges of one model on Triton's own metrics endpoint, all labelled with the model's name.

A metric costs a message to the server each time it is set (tens of microseconds in 2.51), so they are brought up to date a few times a
second, from a thread of their own, and not at every step.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from serving.pipeline.scheduler import SchedulerCounts

from .response import OUTCOMES, ResponseWriter

PERIOD_S = 0.25

GAUGES = {
    "reader_active_slots": "Questions being decoded",
    "reader_waiting_questions": "Encoded questions that wait for a slot",
    "reader_in_flight_questions": "Questions taken and not yet answered",
    "reader_kv_cache_bytes": "Bytes of keys and values that running questions use",
}
COUNTERS = {
    "reader_generated_tokens_total": "Tokens generated",
    "reader_steps_total": "Decoder steps run",
    "reader_step_seconds_total": "Seconds spent in decoder steps",
    "reader_first_token_seconds_total": "Seconds from arrival to first token, summed over answered questions",
}
OUTCOME_COUNTER = ("reader_questions_total", "Questions by how they ended")


ENCODER_COUNTERS = {
    "encoder_engine_seconds_total": "Seconds spent in encoder calls, transfers between models not included",
    "encoder_passages_total": "Passages encoded",
    "encoder_tokens_total": "Valid tokens encoded",
}


class EncoderMetrics:
    """Counts what an encoder model has done."""

    def __init__(self, model: str):
        counter = pb_utils.MetricFamily.COUNTER
        self._families = [pb_utils.MetricFamily(name=name, description=text, kind=counter) for name, text in ENCODER_COUNTERS.items()]
        self._metrics = [family.Metric(labels={"model": model}) for family in self._families]

    def encoded(self, seconds: float, passages: int, tokens: int) -> None:
        """Count one call."""
        for metric, value in zip(self._metrics, (seconds, passages, tokens), strict=True):
            metric.increment(value)


class Metrics:
    """Publishes what `counts` tells and what replies report, until closed."""

    def __init__(
        self, model: str, counts: Callable[[], SchedulerCounts], in_flight: Callable[[], int], kv_bytes: Callable[[SchedulerCounts], int]
    ):
        self._counts, self._in_flight, self._kv_bytes = counts, in_flight, kv_bytes
        labels = {"model": model}
        # a family must live as long as its metrics
        kinds = {**dict.fromkeys(GAUGES, pb_utils.MetricFamily.GAUGE), **dict.fromkeys(COUNTERS, pb_utils.MetricFamily.COUNTER)}
        self._families = [
            pb_utils.MetricFamily(name=name, description=text, kind=kinds[name]) for name, text in {**GAUGES, **COUNTERS}.items()
        ]
        self._metrics = {name: family.Metric(labels=labels) for name, family in zip({**GAUGES, **COUNTERS}, self._families, strict=True)}
        outcomes = pb_utils.MetricFamily(name=OUTCOME_COUNTER[0], description=OUTCOME_COUNTER[1], kind=pb_utils.MetricFamily.COUNTER)
        self._families.append(outcomes)
        self._outcomes = {outcome: outcomes.Metric(labels={**labels, "outcome": outcome}) for outcome in OUTCOMES}
        self._published: collections.Counter[str] = collections.Counter()
        self._ended: collections.Counter[str] = collections.Counter()
        self._first_token_s = 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def refused(self) -> None:
        """Count a request that was refused before it was taken in hand."""
        with self._lock:
            self._ended["refused"] += 1

    def ended(self, writer: ResponseWriter) -> None:
        """Count a question that has ended."""
        with self._lock:
            self._ended[writer.outcome] += 1
            if writer.outcome == "answered":
                self._first_token_s += writer.times.first_token - writer.caller.arrived_s

    def close(self) -> None:
        """Publish once more and stop."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            self._publish()
        self._publish()

    def _publish(self) -> None:
        counts = self._counts()
        with self._lock:
            ended, first_token_s = dict(self._ended), self._first_token_s
        gauges = {
            "reader_active_slots": counts.running,
            "reader_waiting_questions": counts.waiting,
            "reader_in_flight_questions": self._in_flight(),
            "reader_kv_cache_bytes": self._kv_bytes(counts),
        }
        for name, value in gauges.items():
            # by how much it changed: several processes of a model share the gauge
            if self._published[name] != value:
                self._metrics[name].increment(value - self._published[name])
                self._published[name] = value
        totals = {
            "reader_generated_tokens_total": counts.tokens,
            "reader_steps_total": counts.steps,
            "reader_step_seconds_total": counts.step_s,
            "reader_first_token_seconds_total": first_token_s,
        }
        for name, total in totals.items():
            self._advance(name, total, self._metrics[name])
        for outcome, total in ended.items():
            self._advance(outcome, total, self._outcomes[outcome])

    def _advance(self, name: str, total: float, metric: object) -> None:
        if total > self._published[name]:
            metric.increment(total - self._published[name])  # type: ignore[attr-defined]
            self._published[name] = total  # type: ignore[assignment]
