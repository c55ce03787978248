"""The sweep: what is made of perf_analyzer's times, the order of points, and one whole small sweep with the real program and server."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from fido_client.data.examples import Context, Example
from fido_client.request import ReaderRequest, tensors_from_request
from perf.report.verdict import FEW_TURNS
from perf.served.concurrency import Row, Window, checks, row_from_windows, window_of
from perf.served.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, Timeline, find_perf_analyzer, timelines
from perf.served.sweep import READERS, Point, points_of, poisson_gaps_us, summary_of
from perf.served.sweep import main as run_sweep
from perf.served.workload import (
    AIPERF_TEMPLATE,
    PLANS,
    WORKLOADS,
    Request,
    RequestMaker,
    Series,
    Uniform,
    WorkloadError,
    WorkloadSpec,
    cpu_plan,
    exactly,
    requests_from,
    uniform,
)
from perf.served.workload import (
    main as write_workload,
)
from serving.contract.manifest import Manifest
from serving.pipeline.prompt import PromptEncoder

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
    assert run_sweep(arguments) == 0
    result = json.loads((run / "sweep.json").read_text())
    assert len(result["points"]) == 6 and not result["settings"]["failures"]
    for point in result["points"]:
        assert point["errors"] == 0 and point["questions_per_s"] > 0 and (run / point["raw"]).is_file()
        assert (run / point["raw"]).with_suffix(".csv").read_text().startswith(("Concurrency", "Request Rate"))
        assert point["server"][f"{point['model']} reader_generated_tokens_total"] >= 4 * point["requests"]
        assert point["mode"] == "concurrency" or point["sent_per_s"] == pytest.approx(point["load"], rel=0.3)
        assert (point["ttft_ms"] is not None) == point["model"].endswith("_stream")


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


# Workloads: exact lengths with a real tokenizer, the same requests for the same seed, perf_analyzer's format.

SPEC = WorkloadSpec(Uniform(1, 5), Uniform(20, 24), Uniform(1, 8))


@pytest.fixture(scope="module")
def reader(engines):
    """Version directory of an exported reader, with its tokenizer and manifest."""
    directory = engines["fido"][1]
    return directory, Tokenizer.from_file(str(directory / "tokenizer.json")), Manifest.load(directory)


def test_every_row_is_as_long_as_drawn(reader):
    _, tokenizer, manifest = reader
    maker, encoder = RequestMaker(tokenizer, manifest), PromptEncoder(tokenizer, manifest)
    longest = manifest.prompt.passage_length
    for length in {16, longest - 1, longest}:
        spec = WorkloadSpec(exactly(3), exactly(length), exactly(7))
        for request in maker.make(spec, 5, seed=1):
            mask = encoder.encode(request.question, request.passages).attention_mask
            assert mask.sum(axis=1).tolist() == [length] * 3 == maker.lengths(request)
            assert request.new_tokens == 7


def test_draws_stay_in_their_bounds_and_reach_them(reader):
    _, tokenizer, manifest = reader
    maker = RequestMaker(tokenizer, manifest)
    requests = list(maker.make(SPEC, 200, seed=0))
    rows = [length for request in requests for length in maker.lengths(request)]
    assert {len(request.passages) for request in requests} == set(range(1, 6))
    assert set(rows) == set(range(20, 25))
    assert {request.new_tokens for request in requests} == set(range(1, 9))


def test_the_seed_decides(reader):
    _, tokenizer, manifest = reader
    maker = RequestMaker(tokenizer, manifest)
    first, again, other = (list(maker.make(SPEC, 4, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({request.passages for request in first}) == 4


@pytest.mark.parametrize(
    ("tokens", "message"), [(exactly(10_000), "wanted at most the reader's passage_length"), (exactly(2), "wanted more than the")]
)
def test_lengths_that_the_reader_cannot_have_are_refused(reader, tokens, message):
    _, tokenizer, manifest = reader
    spec = dataclasses.replace(SPEC, passage_tokens=tokens)
    with pytest.raises(WorkloadError, match=message):
        list(RequestMaker(tokenizer, manifest).make(spec, 1, 0))


def test_uniform_is_uniform():
    numbers = random.Random(0)
    counts = [0] * 4
    for _ in range(8000):
        counts[Uniform(3, 6).draw(numbers) - 3] += 1
    assert all(abs(count - 2000) < 200 for count in counts)
    assert str(Uniform(3, 6)) == "3..6" and str(exactly(3)) == "3"


@pytest.mark.parametrize("text", ["0", "5..4", "..3", "x", "-1..2"])
def test_what_is_no_range_is_refused(text):
    assert uniform("7") == exactly(7) and uniform("7..9") == Uniform(7, 9)
    with pytest.raises(ValueError, match=r"wanted 1 <=|invalid literal"):
        uniform(text)


def tensors_of(entry: dict) -> dict[str, np.ndarray]:
    """What perf_analyzer sends for an entry of its input data: `{"content": ..., "shape": ...}`, or a flat list of the model's own dims."""
    tensors = {}
    for name, value in entry.items():
        content, shape = (value["content"], value["shape"]) if isinstance(value, dict) else (value, [len(value)])
        values = [item.encode() if isinstance(item, str) else item for item in content]
        tensors[name] = np.array(values, object if isinstance(content[0], str) else np.int32).reshape(shape)
    return tensors


@pytest.mark.parametrize(
    "request_",
    [
        Request("Où?", ("one", "two", "three"), None, 5),
        *requests_from([Example("1", "q", ("x",), (Context("a", "A"), Context("b"))), Example("2", "q", ("x",), (Context("a"),))]),
    ],
    ids=["forced length", "titles", "no titles"],
)
def test_perf_analyzer_sends_the_tensors_that_our_client_sends(request_):
    ours = tensors_from_request(
        ReaderRequest(request_.question, request_.passages, request_.titles, request_.new_tokens, request_.new_tokens)
    )
    sent = tensors_of(request_.as_perf_analyzer())
    assert {name: (array.shape, array.tolist()) for name, array in sent.items()} == {
        name: (array.shape, array.tolist()) for name, array in ours.items()
    }


@pytest.mark.parametrize("titles", [None, ("Österreich", 'a "quoted" <b>')])
def test_aiperfs_template_makes_the_body_of_generate(titles):
    jinja2 = pytest.importorskip("jinja2")  # as aiperf 0.13 renders it: escaping, the texts by name, then the entry's extra
    entry = Request("who?", ("it's", "two\nlines"), titles, new_tokens=7).as_aiperf()
    texts = {text["name"]: text["contents"] for text in entry["texts"]}
    template = jinja2.Environment(autoescape=True).from_string(AIPERF_TEMPLATE)
    body = json.loads(template.render(query=texts["query"][0], passages=texts["passages"], texts_by_name=texts)) | entry["extra"]
    wanted = {"question": "who?", "passages": ["it's", "two\nlines"], "max_new_tokens": 7, "min_new_tokens": 7}
    assert body == wanted | ({"titles": list(titles)} if titles else {})


def test_a_workload_for_aiperf_is_a_line_a_request_with_its_template(reader, tmp_path):
    command = ["paper", "--reader", str(reader[0]), "--requests", "3", "--passage-tokens", "40"]
    assert write_workload([*command, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert write_workload([*command, "--out", str(tmp_path / "out.json")]) == 0
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    same = json.loads((tmp_path / "out.json").read_text())["data"]
    assert [entry["texts"][0]["contents"] for entry in entries] == [entry["question"] for entry in same]
    assert (tmp_path / "out.jinja").read_text().strip() == AIPERF_TEMPLATE


def test_the_command_writes_a_file_or_says_what_is_wrong(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "paper", SPEC)
    out = tmp_path / "deep" / "input.json"
    assert write_workload(["paper", "--reader", str(reader[0]), "--requests", "3", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["data"]) == 3
    assert "3 requests: 1..5 passages x 20..24 tokens, answers of 1..8 tokens, seed 0" in capsys.readouterr().out
    assert (
        write_workload(
            ["paper", "--reader", str(reader[0]), "--requests", "1", "--passages", "2", "--new-tokens", "3..3", "--out", str(out)]
        )
        == 0
    )
    (entry,) = json.loads(out.read_text())["data"]
    assert entry["passages"]["shape"] == [2] and entry["max_new_tokens"] == [3] == entry["min_new_tokens"]
    capsys.readouterr()
    monkeypatch.setitem(WORKLOADS, "paper", dataclasses.replace(SPEC, passage_tokens=exactly(10_000)))
    assert write_workload(["paper", "--reader", str(reader[0]), "--out", str(out)]) == 1
    assert "error: passage_tokens: wanted at most" in capsys.readouterr().err
