"""Counters and gauges of one model on Triton's own metrics endpoint, labelled with the model's name.

Setting a metric costs a message to the server (tens of microseconds in 2.51). So a thread of its own publishes the changes a few times a
second, and no decoder step sets a metric.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import threading
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from serving.pipeline.answer_cache import CacheCounts
from serving.pipeline.scheduler import SchedulerCounts

from .response import OUTCOMES, ResponseWriter

PERIOD_S = 0.25

GAUGES = {
    "reader_active_slots": "Questions being decoded",
    "reader_waiting_questions": "Encoded questions that wait for a slot",
    "reader_in_flight_questions": "Questions accepted and not yet answered",
    "reader_kv_cache_bytes": "Bytes of keys and values that running questions use",
    "reader_answer_cache_bytes": "Bytes of whole answers kept for identical requests",
    "reader_encoder_cache_bytes": "Bytes of encoder states kept for passages that come again",
}
# The name of the release before, published beside the new one for this release.
OLD_GAUGES = {"reader_in_flight_questions": "reader_in_hand_questions"}
COUNTERS = {
    "reader_generated_tokens_total": "Tokens generated",
    "reader_steps_total": "Decoder steps run",
    "reader_step_seconds_total": "Seconds spent in decoder steps",
    "reader_first_token_seconds_total": "Seconds from arrival to first token, summed over answered questions",
    "reader_answer_cache_hits_total": "Requests whose answer was kept from an identical one",
    "reader_answer_cache_misses_total": "Requests that were looked up among the kept answers and not found",
    "reader_encoder_cache_hits_total": "Passages whose encoder states were kept",
    "reader_encoder_cache_misses_total": "Passages that were looked up among the kept encoder states and not found",
    "reader_dropped_encoder_tokens_total": "Encoder tokens dropped by token elimination",
}
OUTCOME_COUNTER = ("reader_questions_total", "Questions by how they ended")
# Triton's own request duration ends when `execute` returns, long before the answer. These are of answered questions.
HISTOGRAMS = {
    "reader_answer_seconds": "Seconds from arrival to the final response of answered questions",
    "reader_queue_seconds": "Seconds that answered questions waited for an encoding thread and for a slot",
}
BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0)
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


class Histogram:
    """Observations in cumulative buckets, as Prometheus names them: NAME_bucket{le}, NAME_sum, NAME_count.

    Triton 2.51 has no histograms for Python models, so each bucket is a counter.
    """

    def __init__(self, bounds: tuple[float, ...] = BUCKETS_S):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def totals(self) -> dict[str, float]:
        """Suffix, with its `le` for a bucket -> total so far."""
        cumulative = list(itertools.accumulate(self._counts))
        edges = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        buckets = {f"_bucket {edge}": float(count) for edge, count in zip(edges, cumulative, strict=True)}
        return {**buckets, "_sum": self._sum, "_count": float(cumulative[-1])}


class Metrics:
    """Publishes the scheduler's counts and what response writers report, until closed.

    Args:
        model: label of every metric.
        counts: of the scheduler.
        in_flight: questions accepted and not yet answered.
        kv_bytes: bytes of keys and values at these counts.
        cache: counts of the kept answers.
        encoder_cache: counts of the kept encoder states.
    """

    def __init__(
        self,
        model: str,
        counts: Callable[[], SchedulerCounts],
        in_flight: Callable[[], int],
        kv_bytes: Callable[[SchedulerCounts], int],
        cache: Callable[[], CacheCounts] = CacheCounts,
        encoder_cache: Callable[[], CacheCounts] = CacheCounts,
    ):
        self._counts, self._in_flight, self._kv_bytes = counts, in_flight, kv_bytes
        self._cache, self._encoder_cache = cache, encoder_cache
        self._labels = {"model": model}
        self._families: dict[str, Any] = {}  # a family must live as long as its metrics
        self._metrics: dict[str, Any] = {}
        for name, text in GAUGES.items():
            self._add(name, text, gauge=True)
        for name, old in OLD_GAUGES.items():
            self._add(old, f"Old name of {name}", gauge=True)
        for name, text in COUNTERS.items():
            self._add(name, text)
        for outcome in OUTCOMES:
            self._add(OUTCOME_COUNTER[0], OUTCOME_COUNTER[1], outcome, {"outcome": outcome})
        self._histograms = {name: Histogram() for name in HISTOGRAMS}
        for name, histogram in self._histograms.items():
            for suffix in histogram.totals():
                series, _, edge = suffix.partition(" ")
                self._add(f"{name}{series}", HISTOGRAMS[name], f"{name}{suffix}", {"le": edge} if edge else {})
        self._published: dict[str, float] = collections.defaultdict(float)
        self._ended: collections.Counter[str] = collections.Counter()
        self._first_token_s = 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _add(self, name: str, description: str, key: str = "", labels: dict[str, str] | None = None, *, gauge: bool = False) -> None:
        if name not in self._families:
            kind = pb_utils.MetricFamily.GAUGE if gauge else pb_utils.MetricFamily.COUNTER
            self._families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._metrics[key or name] = self._families[name].Metric(labels={**self._labels, **(labels or {})})

    def refused(self) -> None:
        """Count a request that was refused before it was accepted."""
        with self._lock:
            self._ended["refused"] += 1

    def ended(self, writer: ResponseWriter) -> None:
        """Count a question that has ended."""
        times, arrived = writer.times, writer.caller.arrived_s
        with self._lock:
            self._ended[writer.outcome] += 1
            if writer.outcome == "answered":
                self._first_token_s += times.first_token - arrived
                self._histograms["reader_answer_seconds"].observe(times.ended - arrived)
                self._histograms["reader_queue_seconds"].observe(writer.queue_s)

    def close(self) -> None:
        """Publish once more and stop."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        failed = False
        while True:
            last = self._closing.wait(PERIOD_S)
            try:
                self._publish()
            except Exception as error:  # a metric that cannot be set today may be set next time; answers do not depend on it
                if not failed:
                    pb_utils.Logger.log_warn(f"{self._labels['model']}: metrics cannot be published: {error!r}")
                failed = True
            if last:
                return

    def _publish(self) -> None:
        counts, cache, states = self._counts(), self._cache(), self._encoder_cache()
        with self._lock:
            totals = {outcome: float(total) for outcome, total in self._ended.items()}
            totals["reader_first_token_seconds_total"] = self._first_token_s
            for name, histogram in self._histograms.items():
                totals |= {f"{name}{suffix}": total for suffix, total in histogram.totals().items()}
        totals |= {
            "reader_generated_tokens_total": counts.tokens,
            "reader_steps_total": counts.steps,
            "reader_step_seconds_total": counts.step_s,
            "reader_answer_cache_hits_total": cache.hits,
            "reader_answer_cache_misses_total": cache.misses,
            "reader_encoder_cache_hits_total": states.hits,
            "reader_encoder_cache_misses_total": states.misses,
            "reader_dropped_encoder_tokens_total": counts.dropped_tokens,
        }
        gauges: dict[str, float] = {
            "reader_active_slots": counts.beams,
            "reader_waiting_questions": counts.waiting,
            "reader_in_flight_questions": self._in_flight(),
            "reader_kv_cache_bytes": self._kv_bytes(counts),
            "reader_answer_cache_bytes": cache.bytes,
            "reader_encoder_cache_bytes": states.bytes,
        }
        gauges |= {old: gauges[name] for name, old in OLD_GAUGES.items()}
        for name, value in {**totals, **gauges}.items():
            # By how much it changed: several processes of a model share a gauge.
            if (change := value - self._published[name]) and (change > 0 or name in gauges):
                self._metrics[name].increment(change)
                self._published[name] = value
