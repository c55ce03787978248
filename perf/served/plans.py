"""What `make perf` measures: load points of each plan, one plan for a small machine and one for a card. Nothing is measured here."""

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
        spec: of made requests; None = questions of the data file as they are.
        concurrency: questions in flight, a point each.
        request_rate: questions sent a second whatever comes back, a point each.
        streaming: questions in flight of the streaming model, a point each.
        requests: measured in each point, warm-up and tail not counted; at a request rate half as many.
        alone: the same with one question in flight, where nothing is spread by others.
    """

    workload: str
    spec: WorkloadSpec | None
    concurrency: tuple[int, ...] = ()
    request_rate: tuple[float, ...] = ()
    streaming: tuple[int, ...] = ()
    requests: int = 120
    alone: int = 120

    def points(self) -> list[tuple[Mode, float, bool]]:
        """Mode, load and whether it streams, of each point."""
        unary: list[tuple[Mode, float, bool]] = [("concurrency", load, False) for load in self.concurrency]
        rates: list[tuple[Mode, float, bool]] = [("request_rate", load, False) for load in self.request_rate]
        return unary + rates + [("concurrency", load, True) for load in self.streaming]


def _made(passages: int, tokens: Uniform, new_tokens: int) -> WorkloadSpec:
    return WorkloadSpec(exactly(passages), tokens, exactly(new_tokens))


def cpu_plan(passage_length: int) -> tuple[Series, ...]:
    """For the demo readers on a few cores. The first series of a plan is the one that the verdict speaks of."""
    full, ragged = exactly(passage_length), Uniform(passage_length // 3, passage_length)
    return (
        Series("demo", _made(10, full, 32), (1, 8, 16, 64), (8.0, 16.0), (1, 8)),
        Series("answers_128", _made(10, full, 128), (8,), requests=48),
        Series("answers_512", _made(10, full, 512), (8,), requests=24),
        Series("passages_5", _made(5, full, 32), (4,), requests=60),
        Series("passages_20", _made(20, full, 32), (4,), requests=40),
        Series("passages_40", _made(40, full, 32), (4,), requests=24),
        Series("padding", _made(10, ragged, 32), (4,), requests=80),
        Series(REAL, None, (4,), requests=100),
    )


def card_plan(passage_length: int) -> tuple[Series, ...]:
    """For base-size readers on a GPU: the paper's workload first, then longer answers, other numbers of passages, ragged passages."""
    full, ragged = exactly(passage_length), Uniform(passage_length // 3, passage_length)
    return (
        Series("paper", _made(40, full, 32), (1, 16, 64, 128), (80.0,), (16,), requests=256, alone=40),
        Series("answers_128", _made(40, full, 128), (64,), requests=128),
        Series("answers_512", _made(40, full, 512), (64,), requests=96),
        Series("passages_10", _made(10, full, 32), (64,), requests=256),
        Series("padding", _made(40, ragged, 32), (64,), requests=192),
    )


def smoke_plan(passage_length: int) -> tuple[Series, ...]:
    """Every kind of point once, as small as can be: for the tests."""
    full = exactly(passage_length)
    return (Series("demo", _made(2, full, 4), (2,), (20.0,), (1,), requests=12),)


PLANS = {"cpu": cpu_plan, "card": card_plan, "smoke": smoke_plan}
