"""The sweep: what is made of perf_analyzer's times, the order of points, and one whole small sweep with the real program and server."""

from __future__ import annotations

import json

import pytest

from perf.report.verdict import FEW_TURNS
from perf.served.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, Timeline, find_perf_analyzer, timelines
from perf.served.plans import PLANS, Series, cpu_plan
from perf.served.sweep import READERS, Point, main, points_of, poisson_gaps_us, summary_of
from perf.served.workload import WORKLOADS

MS = 1_000_000


def steady(count: int, every_ms: int, latency_ms: int, in_flight: int = 1) -> list[Timeline]:
    return [Timeline((i - in_flight + 1) * every_ms * MS, ((i - in_flight + 1) * every_ms * MS + latency_ms * MS,)) for i in range(count)]


def test_rate_and_latency_are_those_of_the_counted_part():
    slow_start = [Timeline(0, (5000 * MS,))]
    requests = slow_start + [Timeline(5000 * MS + i * 10 * MS, (5000 * MS + (i + 1) * 10 * MS,)) for i in range(60)]
    found = summary_of(requests, (4, 1), None)
    assert found["questions_per_s"] == pytest.approx(100) and found["latency_ms"]["p99"] == pytest.approx(10)
    assert found["requests"] == 61 - 5 and found["errors"] == 0 and found["stable"]


def test_a_point_that_slows_down_is_marked_and_kept():
    requests = steady(30, 10, 10) + [Timeline((300 + i * 20) * MS, ((320 + i * 20) * MS,)) for i in range(30)]
    found = summary_of(requests, (4, 1), None)
    assert not found["stable"] and 50 < found["questions_per_s"] < 100


def test_a_point_of_too_few_answers_is_counted_whole_and_never_stable():
    found = summary_of(steady(5, 10, 10), (4, 4), None)
    assert found["requests"] == 5 and not found["stable"]


def test_streams_have_times_to_the_first_and_between_tokens():
    requests = [Timeline(i * 100 * MS, tuple((i * 100 + 20 + 5 * t) * MS for t in range(5))) for i in range(20)]
    found = summary_of(requests, (4, 1), 5)
    assert found["ttft_ms"]["p50"] == pytest.approx(20) and found["inter_token_ms"]["p99"] == pytest.approx(5)
    assert found["tokens_per_s"] == pytest.approx(50)


def test_unanswered_requests_are_errors():
    found = summary_of([*steady(30, 10, 10), Timeline(400 * MS, (), ok=False)], (4, 1), None)
    assert found["errors"] == 1
    with pytest.raises(PerfAnalyzerError, match="not one request was answered"):
        summary_of([Timeline(0, (), ok=False)], (4, 1), None)


def test_timelines_are_relative_and_in_the_order_of_sending():
    export = {
        "experiments": [{"requests": [{"timestamp": 30, "response_timestamps": [50, 40]}, {"timestamp": 10, "response_timestamps": []}]}]
    }
    assert timelines(export) == [Timeline(0, (), ok=False), Timeline(20, (30, 40))]


def test_readers_take_turns_at_every_point_and_change_places_every_round():
    series = (Series("a", WORKLOADS["paper"], (1, 4)), Series("b", None, request_rate=(5.0,)))
    points = points_of(series, 2)
    assert [p.reader for p in points] == ["fid", "fido"] * 3 + ["fido", "fid"] * 3
    for first, second in zip(points[::2], points[1::2], strict=True):
        assert (first.series, first.load, first.round) == (second.series, second.load, second.round)
    assert len({point.name for point in points}) == len(points)


def test_every_plan_fits_the_readers_that_it_is_for():
    for plan in PLANS.values():
        for series in plan(128):
            assert series.points() and series.requests >= 3
            assert series.spec is None or series.spec.passage_tokens.high <= 128
    assert cpu_plan(128)[0].concurrency[0] == 1  # latency alone is read from there


def test_skipped_requests_are_those_in_flight():
    series = Series("a", WORKLOADS["paper"])
    assert Point("fid", series, "concurrency", 16, False, 0).skipped == (16, 16)
    assert Point("fid", series, "concurrency", 1, True, 0).skipped == (4, 1)
    assert Point("fid", series, "request_rate", 50.0, False, 0).skipped == (4, 4)


def test_every_place_in_flight_gives_enough_answers_for_a_steady_point():
    series = Series("a", WORKLOADS["paper"], requests=256, turns=12)
    counted = [
        point.requests - sum(point.skipped) for point in (Point("fid", series, "concurrency", load, False, 0) for load in (4, 16, 128))
    ]
    assert counted == [256, 256, 1536]
    loads = [(series, load) for series in PLANS["gpu"](256) for load in series.concurrency if load > 1]
    assert all(Point("fid", series, "concurrency", load, False, 0).requests >= FEW_TURNS * load for series, load in loads)


def test_one_question_at_a_time_takes_fewer_of_them():
    series = Series("a", WORKLOADS["paper"], requests=256, alone=40)
    sent = {load: Point("fid", series, "concurrency", load, False, 0).requests for load in (1, 16)}
    assert sent == {1: 40 + 4 + 1, 16: 256 + 32}
    assert Point("fid", series, "request_rate", 1.0, False, 0).requests == 128 + 8


def test_gaps_have_the_mean_of_the_rate_and_a_poisson_process_s_spread():
    gaps = poisson_gaps_us(8.0, 500, 3)
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(125_000, rel=1e-3) and gaps == poisson_gaps_us(8.0, 500, 3) != poisson_gaps_us(8.0, 500, 4)
    assert sum((gap / mean - 1) ** 2 for gap in gaps) / len(gaps) == pytest.approx(1.0, abs=0.25)


def test_a_program_that_does_not_run_is_said_so(tmp_path):
    program = tmp_path / "perf_analyzer"
    program.write_text("#!/bin/sh\necho no such thing\n")
    program.chmod(0o755)
    with pytest.raises(PerfAnalyzerError, match="no such thing"):
        PerfAnalyzer(program).version()


@pytest.mark.server
@pytest.mark.slow
def test_a_small_sweep_with_the_real_perf_analyzer(engines, tmp_path, monkeypatch):
    assert "2." in find_perf_analyzer().version()
    folder = tmp_path / "engines"
    folder.mkdir()
    for reader in READERS:
        (folder / reader).symlink_to(engines[reader][1])
    run = tmp_path / "run"
    arguments = ["--plan", "smoke", "--rounds", "1", "--engines", str(folder), "--run", str(run), "--log", str(tmp_path / "log")]
    assert main(arguments) == 0
    result = json.loads((run / "sweep.json").read_text())
    assert len(result["points"]) == 6 and not result["settings"]["failures"]
    for point in result["points"]:
        assert point["errors"] == 0 and point["questions_per_s"] > 0 and (run / point["raw"]).is_file()
        assert (run / point["raw"]).with_suffix(".csv").read_text().startswith(("Concurrency", "Request Rate"))
        assert point["server"][f"{point['model']} reader_generated_tokens_total"] >= 4 * point["requests"]
        assert point["mode"] == "concurrency" or point["sent_per_s"] == pytest.approx(point["load"], rel=0.3)
        assert (point["ttft_ms"] is not None) == point["model"].endswith("_stream")
