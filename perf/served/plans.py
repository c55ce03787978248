"""The load points of `make perf` and `make gpu-bench`: one plan for a small machine, one for a GPU. Nothing is measured here."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .workload import REAL, Uniform, WorkloadSpec, exactly

Mode = Literal["concurrency", "request_rate"]


@dataclasses.dataclass(frozen=True)
class Series:
    """Load points of one workload.

    Attributes:
        workload: its name in tables and files.
        spec: of synthetic requests; None: the questions of the data file.
        concurrency: questions in flight (closed loop), one point for each.
        request_rate: questions sent per second (open loop), one point for each.
        streaming: questions in flight of the streaming model, one point for each.
        requests: measured at each point, without warm-up and tail; half as many at a request rate.
        alone: measured at concurrency 1, where latencies vary less.
        turns: answers of each place in flight, at least; points with few of them are not steady, as equal answers end together.
    """

    workload: str
    spec: WorkloadSpec | None
    concurrency: tuple[int, ...] = ()
    request_rate: tuple[float, ...] = ()
    streaming: tuple[int, ...] = ()
    requests: int = 120
    alone: int = 120
    turns: int = 0

    def points(self) -> list[tuple[Mode, float, bool]]:
        """Mode, load and streaming flag of each point."""
        unary: list[tuple[Mode, float, bool]] = [("concurrency", load, False) for load in self.concurrency]
        rates: list[tuple[Mode, float, bool]] = [("request_rate", load, False) for load in self.request_rate]
        return unary + rates + [("concurrency", load, True) for load in self.streaming]


def _synthetic(passages: int, tokens: Uniform, new_tokens: int) -> WorkloadSpec:
    return WorkloadSpec(exactly(passages), tokens, exactly(new_tokens))


def cpu_plan(passage_length: int) -> tuple[Series, ...]:
    """For the demo readers on a few cores. The first series of a plan is the main workload, which the verdict is about."""
    full, ragged = exactly(passage_length), Uniform(passage_length // 3, passage_length)
    return (
        Series("demo", _synthetic(10, full, 32), (1, 8, 16, 64), (8.0, 16.0), (1, 8)),
        Series("answers_128", _synthetic(10, full, 128), (8,), requests=48),
        Series("answers_512", _synthetic(10, full, 512), (8,), requests=24),
        Series("passages_5", _synthetic(5, full, 32), (4,), requests=60),
        Series("passages_20", _synthetic(20, full, 32), (4,), requests=40),
        Series("passages_40", _synthetic(40, full, 32), (4,), requests=24),
        Series("padding", _synthetic(10, ragged, 32), (4,), requests=80),
        Series(REAL, None, (4,), requests=100),
    )


def gpu_plan(passage_length: int) -> tuple[Series, ...]:
    """For base-size readers on a GPU: the paper's workload first, then longer answers, other numbers of passages, ragged passages."""
    full, ragged = exactly(passage_length), Uniform(passage_length // 3, passage_length)
    return (
        Series("paper", _synthetic(40, full, 32), (1, 16, 64, 128), (80.0,), (16,), requests=256, alone=40, turns=12),
        Series("answers_128", _synthetic(40, full, 128), (64,), turns=12),
        Series("answers_512", _synthetic(40, full, 512), (64,), turns=12),
        Series("passages_10", _synthetic(10, full, 32), (64,), turns=12),
        Series("padding", _synthetic(40, ragged, 32), (64,), turns=12),
    )


def paper_plan(passage_length: int) -> tuple[Series, ...]:
    """The paper's workload alone, for a base-size reader on a GPU: one question at a time, and a full server."""
    return (Series("paper", _synthetic(40, exactly(passage_length), 32), (1, 64, 128), requests=384, alone=30),)


def smoke_plan(passage_length: int) -> tuple[Series, ...]:
    """Every kind of point once, as small as possible, for the tests."""
    full = exactly(passage_length)
    return (Series("demo", _synthetic(2, full, 4), (2,), (20.0,), (1,), requests=12),)


# "card" is the former name of "gpu", kept for one release
PLANS = {"cpu": cpu_plan, "gpu": gpu_plan, "card": gpu_plan, "paper": paper_plan, "smoke": smoke_plan}
