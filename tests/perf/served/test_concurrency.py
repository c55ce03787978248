from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from fido_client.data.examples import Context, Example
from perf.served.concurrency import Row, Window, checks, row_from_windows, window_of


def row(concurrency: int, rate: float, p99_s: float) -> Row:
    return Row(concurrency, rate, (rate, rate), p99_s / 2, p99_s)


def test_a_row_is_the_median_of_its_windows():
    windows = [Window((0.1,) * 10, 1.0), Window((0.2,) * 10, 2.0), Window((0.4,) * 10, 4.0)]
    found = row_from_windows(4, windows)
    assert (found.questions_per_s, found.questions_per_s_min_max) == (5.0, (2.5, 10.0))
    assert (found.p50_s, found.p99_s) == (pytest.approx(0.2), pytest.approx(0.2))
    assert found.p99_over_ideal == pytest.approx(0.2 * 5 / 4)


def test_in_a_closed_loop_where_none_overtakes_p99_is_ideal():
    assert row(64, 100.0, 0.64).p99_over_ideal == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rows", "throughput_holds", "p99_holds"),
    [
        ([row(1, 50, 0.02), row(64, 100, 0.64)], True, True),
        ([row(16, 100, 0.2), row(64, 95, 1.0)], True, True),
        ([row(16, 100, 0.2), row(64, 94, 1.0)], False, True),
        ([row(16, 100, 0.2), row(64, 100, 2.0)], True, False),
    ],
)
def test_checks_say_what_does_not_hold(rows, throughput_holds, p99_holds):
    found = checks(rows)
    assert (found["throughput_holds"], found["p99_holds"]) == (throughput_holds, p99_holds)


def test_a_window_keeps_its_concurrency_to_the_end_and_leaves_out_the_first_questions():
    in_flight, most, asked = 0, 0, 0

    async def answer(question, passages):
        nonlocal in_flight, most, asked
        in_flight, asked = in_flight + 1, asked + 1
        most = max(most, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return SimpleNamespace(latency_s=0.001)

    examples = itertools.repeat(Example("0", "q", ("a",), (Context("p", "t"),)))
    window = asyncio.run(window_of(SimpleNamespace(answer=answer), examples, 3, 10, 5))
    assert (most, len(window.latencies_s)) == (3, 10)
    assert 15 <= asked <= 17
    assert window.wall_s > 0
