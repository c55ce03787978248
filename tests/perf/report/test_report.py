from __future__ import annotations

import copy
import json
import re

import pytest

from perf.report import write as report
from perf.report.page import shown, significant
from perf.report.run_folder import ReportError, pack_run, read_run
from perf.report.verdict import claims, verdict
from perf.report.write import write_report


def spread(median, least=None, most=None):
    return {"median": median, "min": median if least is None else least, "max": median if most is None else most}


def point(reader, load, number, rate, workload="demo", *, mode="concurrency", stream=False, stable=True, errors=0):
    new_tokens, passages = {"demo": (32, 10), "short": (8, 10), "many": (32, 20), "padding_half": (32, 10), "real": (None, None)}[workload]
    model = reader + ("_stream" if stream else "")
    return {
        **{"reader": reader, "model": model, "workload": workload, "mode": mode, "load": load, "round": number},
        **{"new_tokens": new_tokens, "passages": passages, "passage_tokens": 128 if passages else None},
        **{"questions_per_s": rate, "tokens_per_s": None, "requests": 200, "errors": errors, "stable": stable},
        "latency_ms": {"p50": 1000 * load / rate, "p90": 1.0, "p95": 1.0, "p99": 2000 * load / rate, "avg": 1.0},
        "ttft_ms": {"p50": 12.5, "p99": 25.0} if stream else None,
        "inter_token_ms": {"p50": 1.25, "p99": 2.5} if stream else None,
        "raw": f"raw/{model}-{workload}-{mode[0]}{load}-r{number}.json",
    }


MACHINE = {
    **{"processor": "AMD EPYC", "gpu": None, "cores": 2, "memory_gib": 23.5, "system": "Linux", "python": "3.11.7"},
    **{"versions": {"numpy": "1.26.4"}, "commit": "abc123", "precision": "float32"},
    **{"copy_tb_per_s": spread(0.02), "peak_tflops": spread(0.1, 0.09, 0.11)},
}
# FiD does best at 4; there FiDO / FiD is 60/30 = 2.0 in round 0 and 72/32 = 2.25 in round 1
SWEEP = {
    "settings": {"workloads": {"demo": "10 x 128, answers of 32", "short": "answers of 8"}, "rounds": 2},
    "points": [
        *(point("fid", 1, 0, 20.0), point("fid", 1, 1, 20.0), point("fid", 4, 0, 30.0), point("fid", 4, 1, 32.0)),
        *(point("fido", 1, 0, 25.0), point("fido", 1, 1, 27.0), point("fido", 4, 0, 60.0), point("fido", 4, 1, 72.0)),
        *(point("fid", 8, 0, 29.0), point("fid", 8, 1, 29.0), point("fido", 8, 0, 80.0), point("fido", 8, 1, 90.0)),
        *(point("fid", 4, 0, 100.0, "short"), point("fido", 4, 0, 150.0, "short")),
    ],
}
STAGES = {
    "readers": {
        reader: {
            "parts_ms": {"tokenize": spread(1.0), "encoder": spread(12.0), "decoder_steps": spread(steps)},
            "step_ms": {"1": spread(2.0), "24": spread(step, step - 1, step + 1), "64": spread(99.0)},
            "step_bound_ms": {"1": 1.0, "24": 10.0},
            **{"encoder_ms": spread(12.0), "encoder_tflops": 0.05, "encoder_bound_ms": 8.0},
            **{"encoder_questions_per_s": spread(83.0), "served_ms": spread(99.0)},
        }
        for reader, steps, step in (("fid", 70.0, 25.0), ("fido", 32.0, 12.0))
    }
}
ROW = {"reader": "fid", "excludes": "tokens"}
PEERS = {
    "peers": [
        {**ROW, "name": "transformers, eager", "questions_per_s": spread(5.0), "p50_ms": spread(200.0), "batch": 1},
        {**ROW, "name": "transformers | compiled", "questions_per_s": spread(12.4), "p50_ms": None, "batch": 4},
    ]
}
ROWS = [
    {"name": "FiD", "period": 1, "num_kv_heads": 12, "decoder": "base", "measured": True, "step_ms": {"1": spread(9.0), "4": spread(20.0)}},
    {"name": "FiDO", "period": 6, "num_kv_heads": 1, "decoder": "xl", "measured": False, "step_ms": None},
]
ABLATION = {"preset": "base", "workload": "40 x 256", "rows": [{**row, "bound_ms": {"1": 4.5, "4": 10.0}} for row in ROWS]}
ROOFLINE = {"points": [{"name": "FiD step, batch 24", "reader": "fid", "flops": 1e9, "bytes": 1e8, "seconds": 0.03, "bound_s": 0.01}]}
EVERYTHING = {"stages": STAGES, "peers": PEERS, "ablation": ABLATION, "roofline": ROOFLINE}


@pytest.fixture
def folder_of(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()

    def write(points=None, **files):
        sweep = copy.deepcopy(SWEEP) if points is None else {**SWEEP, "points": points}
        for name, content in {"machine": MACHINE, "sweep": sweep, **files}.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


def summary_of(folder):
    write_report(folder)
    return json.loads((folder / "summary.json").read_text())


def markdown_of(folder):
    write_report(folder)
    return (folder / "summary.md").read_text()


def said_of(folder):
    run = read_run(folder)
    return " ".join([verdict(run), *claims(run)])


def test_the_verdict_is_one_sentence_about_where_fid_does_best_and_the_claims_follow(folder_of):
    folder = folder_of(**EVERYTHING)
    assert verdict(read_run(folder)) == (
        "On AMD EPYC, 2 cores in float32, FiDO answers 2.13 (2.00..2.25) times as many questions/s as FiD at concurrency 4, where "
        "FiD answers most: 66.0 against 31.0 (10 x 128, answers of 32)."
    )
    text = said_of(folder)
    assert "FiD 31.0 at 4, FiDO 85.0 at 8" in text
    assert "by length of the answer: 8 tokens 1.50 at concurrency 4, 32 tokens 2.13 (2.00..2.25) at concurrency 4." in text
    assert (
        "FiD through Triton answers 2.50 times as many questions/s as the strongest peer measured, transformers | compiled, batch 4" in text
    )
    assert "No peer was measured with FiDO." in text
    assert "step of batch 24 takes 2.50 times its bound in FiD and 1.20 times its bound in FiDO" in text
    assert "in times of its bound, 1.50 in FiD" in text


def test_a_peer_that_failed_or_was_asked_something_else_gives_no_ratio(folder_of):
    failed = {"name": "compiled", "reader": "fid", "batch": 4, "error": "OutOfMemoryError"}
    other = {"name": "eager", "reader": "fid", "batch": 1, "questions_per_s": spread(5.0), "passages": "1..40", "excludes": "tokens"}
    folder = folder_of(peers={"peers": [failed, other]})
    text = markdown_of(folder)
    assert "| compiled | FiD | yes | 4 |  | OutOfMemoryError |" in text
    assert "| eager | FiD | no | 1 | 5.00 |  |" in text
    assert "From every peer: tokens." in text
    assert "strongest peer" not in said_of(folder)


def test_workloads_are_compared_at_the_highest_concurrency_that_all_met(folder_of):
    settings = {"workloads": {"demo": "a", "padding_half": "b"}}
    points = SWEEP["points"][:12] + [point(reader, load, 0, 9.0, "padding_half") for reader in ("fid", "fido") for load in (1, 4)]
    folder = folder_of(sweep={"settings": settings, "points": points})
    rows, where = read_run(folder).alike(["demo", "padding_half"])
    assert ([(row["workload"], row["reader"], row["load"]) for row in rows], where) == (
        [(workload, reader, 4) for workload in ("demo", "padding_half") for reader in ("fid", "fido")],
        "at concurrency 4",
    )


def test_points_that_failed_are_counted(folder_of):
    settings = {**SWEEP["settings"], "failures": ["fid-demo-c64-round0: timed out"]}
    assert said_of(folder_of(sweep={**SWEEP, "settings": settings})).endswith("Points that failed and are missing: 1.")


def test_rounds_that_only_one_reader_has_are_not_paired(folder_of):
    points = [point("fid", 4, 0, 30.0), point("fid", 4, 1, 10.0), point("fido", 4, 0, 60.0), point("fido", 4, 2, 600.0)]
    assert summary_of(folder_of(points))["fido_over_fid"] == spread(2.0)


def test_lengths_of_the_answer_are_compared_over_the_same_passages_only(folder_of):
    settings = {"workloads": {"demo": "a", "short": "b", "many": "c"}}
    points = [*SWEEP["points"], point("fid", 4, 0, 10.0, "many"), point("fido", 4, 0, 70.0, "many")]
    folder = folder_of(sweep={"settings": settings, "points": points})
    assert "7.00" not in said_of(folder)
    assert "7.00" in markdown_of(folder)


def test_readers_that_never_met_have_no_ratio(folder_of):
    folder = folder_of([point("fid", 1, 0, 20.0)])
    assert "were not measured beside each other" in verdict(read_run(folder))
    summary = summary_of(folder)
    assert (summary["fid_questions_per_s"], summary["fido_questions_per_s"], summary["fido_over_fid"]) == (spread(20.0), None, None)


def test_points_that_did_not_settle_or_had_errors_are_marked_and_kept(folder_of):
    points = [*SWEEP["points"], point("fid", 16, 0, 40.0, stable=False), point("fid", 32, 0, 50.0, errors=3)]
    folder = folder_of(points)
    text = markdown_of(folder)
    assert re.search(r"\| FiD \| 16\\\* \| 40\.0\\\* \|", text)
    assert re.search(r"\| FiD \| 32† \| 50\.0† \|.*\| 3 \|", text)
    assert "not steady, or with errors" in (folder / "report.html").read_text()
    assert "Of 10 points, 2 were not steady or had errors" in said_of(folder)
    assert summary_of(folder)["fid_questions_per_s"] == spread(50.0)  # the best of all: the table has no higher number than the best
    assert "| FiD | demo | 32 at once | 50.0† | 3 requests failed |" in text
    assert "| FiD | demo | 16 at once | 40.0\\* | not known; the rounds differ by 0 % |" in text


def test_a_reader_whose_points_are_all_marked_still_has_a_best(folder_of):
    points = [point("fid", 1, 0, 20.0, stable=False), point("fido", 1, 0, 30.0)]
    assert "answers 1.50* times" in verdict(read_run(folder_of(points)))


def test_what_was_not_measured_is_said(folder_of):
    page = markdown_of(folder_of())
    for title in (
        "Roofline",
        "Latency against offered rate",
        "Where a question's time goes",
        "Ablation: from FiD to FiDO",
        "Cost of padding",
    ):
        assert f"## {title}\n\nNot measured in this run.\n" in page
    assert page.count("Not measured in this run.") == 8


def test_everything_measured_leaves_no_section_out(folder_of):
    workloads = {"demo": "a", "short": "b", "many": "c", "padding_half": "d", "real": "e"}
    more = [point(reader, 4, 0, 10.0, workload) for reader in ("fid", "fido") for workload in ("many", "padding_half", "real")]
    more += [point("fido", rate, 0, rate, mode="request_rate") for rate in (10, 20)] + [point("fido", 4, 0, 50.0, stream=True)]
    folder = folder_of(sweep={"settings": {"workloads": workloads}, "points": SWEEP["points"] + more}, **EVERYTHING)
    text = markdown_of(folder)
    assert "Not measured in this run." not in text
    assert "| demo | FiDO, streaming | 4 at once | 12.5 | 25.0 | 1.25 | 2.50 |" in text
    assert "| 1 | FiD step, batch 24 | 10.0 | 0.0333 | 0.00333 | 30.0 | 10.0 | 3.00 |" in text
    assert "| FiDO | 4 |  | 10.0 |  |" in text  # a bound without a measurement
    assert "| transformers \\| compiled | FiD | yes | 4 | 12.4 |  | 2.50 |" in text
    page = (folder / "report.html").read_text()
    # throughput of demo, which alone has several loads; rate, ratio, stages, roofline, ablation, passages, padding
    assert page.count("<svg") == 8


def test_the_page_fetches_nothing_and_links_to_its_raw_files(folder_of):
    folder = folder_of(**EVERYTHING)
    write_report(folder)
    assert '<a href="raw/' not in (folder / "report.html").read_text(), "a link to a raw file that was not kept"
    (folder / "raw").mkdir()
    (folder / "raw/fido-demo-c4-r1.json").write_text("{}")
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:|<script|@import|url\((?!#)|<img|<link", page)
    assert all(not target.startswith(("/", "//")) for target in re.findall(r'href="([^"]+)"', page))
    assert '<a href="raw/fido-demo-c4-r1.json">r1</a>' in page
    assert '<a href="stages.json">' in page
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_a_packed_run_gives_the_same_summary_and_fresh_files_go_before_it(folder_of):
    folder = folder_of(**EVERYTHING)
    (folder / "notes.md").write_text("kept")
    before = summary_of(folder)
    pack_run(folder)
    assert sorted(path.name for path in folder.glob("*.json")) == ["run.json", "summary.json"] and (folder / "notes.md").exists()
    assert summary_of(folder) == before
    (folder / "machine.json").write_text(json.dumps({**MACHINE, "processor": "another"}), encoding="utf-8")
    assert read_run(folder).files["machine"]["processor"] == "another"


def test_the_same_files_give_the_same_bytes(folder_of):
    folder = folder_of(**EVERYTHING)
    written = []
    for _ in range(2):
        write_report(folder)
        written.append([(folder / name).read_bytes() for name in ("report.html", "summary.md", "summary.json")])
    assert written[0] == written[1]


def test_texts_of_a_run_are_not_markup(folder_of):
    folder = folder_of(machine={**MACHINE, "processor": "<b>&"})
    write_report(folder)
    assert "<b>" not in (folder / "report.html").read_text()
    assert "\\<b>&" in (folder / "summary.md").read_text()


def test_the_summary_has_the_numbers_that_others_quote(folder_of):
    summary = summary_of(folder_of(**EVERYTHING))
    assert summary == {
        "machine": MACHINE,
        "commit": "abc123",
        "encoder_ms": spread(12.0),
        "encoder_tflops": 0.05,
        "step_batch": 24,
        "fid_step_ms": spread(25.0, 24.0, 26.0),
        "fido_step_ms": spread(12.0, 11.0, 13.0),
        "encoder_alone_questions_per_s": spread(83.0),
        "fid_questions_per_s": spread(31.0, 30.0, 32.0),
        "fido_questions_per_s": spread(85.0, 80.0, 90.0),
        "fido_over_fid": spread(2.129032, 2.0, 2.25),
        "peer_fid_questions_per_s": spread(12.4),
        "peer_fid_name": "transformers | compiled",
        "fido_p50_ms": pytest.approx({"median": (40 + 1000 / 27) / 2, "min": 1000 / 27, "max": 40.0}),
        "peak_tflops": spread(0.1, 0.09, 0.11),
        "copy_tb_per_s": spread(0.02),
        "encoder_one_question_ms": spread(12.0),
    }


def test_fp8_and_the_strongest_peers_stand_beside_half_precision(folder_of):
    twice = SWEEP | {"points": [row | {"questions_per_s": 2 * row["questions_per_s"]} for row in SWEEP["points"]]}
    ways = {"library_fp16": {"questions_per_s": {"fid": spread(30.0)}}, "library_fp8": {"questions_per_s": {"fid": spread(31.0)}}}
    sizes = {"questions": 24, "passages": 10, "passage_length": 128, "new_tokens": 32}
    library = {"summary": {"library_pytorch_encoder_fp8_ms": 7.0}, "ways": ways, "settings": sizes}
    folder = folder_of(**EVERYTHING, sweep_fp8=twice, stages_fp8=STAGES, library_pytorch=library)
    found = summary_of(folder)
    assert found["fid_fp8_questions_per_s"] == spread(62.0, 60.0, 64.0) and found["encoder_fp8_ms"] == spread(12.0)
    assert found["library_pytorch_encoder_fp8_ms"] == 7.0 and found["peer_fid_questions_per_s"] == spread(30.0)
    text = markdown_of(folder)
    for line in ("fp16 | FiD | yes | 24 | 30.0 |  | 1.03 |", "fp8 | FiD | yes | 24 | 31.0 | 2.00 |", "fp8 | FiDO | yes | 24 |  |"):
        assert f"| PyTorch with library kernels (QuACK, cuDNN), compiled, {line}" in text


def test_the_summary_has_null_where_the_run_has_nothing(folder_of):
    summary = summary_of(folder_of([]))
    assert {key for key, value in summary.items() if value is None} == summary.keys() - {
        "machine",
        "commit",
        "peak_tflops",
        "copy_tb_per_s",
    }


def changed(content, value, *keys):
    """A copy with one value replaced, or removed if it is None."""
    content = copy.deepcopy(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("machine", changed(MACHINE, None, "precision"), "machine.json: precision: wanted, but it is missing"),
        ("machine", changed(MACHINE, 0.02, "copy_tb_per_s"), "machine.json: copy_tb_per_s: wanted an object, got 0.02"),
        ("machine", changed(MACHINE, 0, "peak_tflops", "min"), "machine.json: peak_tflops.min: wanted a number above 0, got 0"),
        ("machine", changed(MACHINE, 9, "peak_tflops", "min"), "machine.json: peak_tflops: wanted min <= median <= max, got "),
        ("machine", [], "machine.json: wanted an object, got []"),
        ("sweep", changed(SWEEP, {}, "settings", "workloads"), "sweep.json: settings.workloads: wanted one at least"),
        (
            "sweep",
            changed(SWEEP, None, "points", 3, "latency_ms", "p50"),
            "sweep.json: points[3].latency_ms.p50: wanted, but it is missing",
        ),
        ("sweep", changed(SWEEP, "30", "points", 0, "questions_per_s"), 'points[0].questions_per_s: wanted a number, got "30"'),
        ("sweep", changed(SWEEP, float("nan"), "points", 0, "questions_per_s"), "points[0].questions_per_s: wanted a number, got NaN"),
        ("sweep", changed(SWEEP, True, "points", 0, "errors"), "points[0].errors: wanted a number, got true"),
        ("sweep", changed(SWEEP, "rate", "points", 0, "mode"), 'points[0].mode: wanted one of concurrency, request_rate, got "rate"'),
        ("sweep", changed(SWEEP, "fido", "points", 0, "model"), 'points[0].model: wanted a model of fid, got "fido"'),
        ("sweep", changed(SWEEP, "paper", "points", 0, "workload"), "points[0].workload: wanted one of settings.workloads (demo, short)"),
        (
            "sweep",
            changed(SWEEP, 1, "points", 0, "round"),
            "points[1]: wanted each point once, got a second one of fid, demo, concurrency, 1, 1",
        ),
        (
            "sweep",
            changed(SWEEP, 64, "points", 5, "new_tokens"),
            "points[5]: wanted new_tokens, passages, passage_tokens of demo as before",
        ),
        ("stages", {"readers": {"fid": {}}}, "stages.json: readers.fid.parts_ms: wanted, but it is missing"),
        (
            "ablation",
            changed(ABLATION, 1.0, "rows", 0, "bound_ms", "big"),
            "ablation.json: rows[0].bound_ms.big: wanted a whole number as key",
        ),
        ("roofline", changed(ROOFLINE, 0, "points", 0, "seconds"), "roofline.json: points[0].seconds: wanted a number above 0, got 0"),
        ("peers", {"peers": [{"name": "x", "reader": "fid"}]}, "peers.json: peers[0]: wanted questions_per_s or error, got neither"),
        ("peers", {"peers": {}}, "peers.json: peers: wanted a list, got {}"),
    ],
)
def test_a_malformed_file_is_refused_by_file_and_key_and_nothing_is_written(folder_of, name, content, message):
    folder = folder_of(**{name: content})
    with pytest.raises(ReportError, match=re.escape(message)) as error:
        write_report(folder)
    assert str(error.value).startswith(str(folder / f"{name}.json"))
    assert not list(folder.glob("report.html")) + list(folder.glob("summary.*"))


def test_the_command_says_what_is_wrong_in_one_line(folder_of, monkeypatch, capsys):
    folder = folder_of()
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    assert report.main() == 0
    (folder / "peers.json").write_text("{")
    assert report.main() == 1
    (folder / "machine.json").unlink()
    assert report.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": wanted")[0] for line in lines] == [f"perf.report: {folder / name}" for name in ("peers.json", "machine.json")]


def test_without_a_folder_every_run_under_the_results_is_reported(folder_of, monkeypatch, capsys):
    folder = folder_of()
    monkeypatch.setattr("sys.argv", ["report"])
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    assert report.main() == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    monkeypatch.setattr(report, "RESULTS", folder / "none")
    assert report.main() == 1
    assert "wanted a folder with a sweep.json or a run.json, found none" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.01234, "0.0123"), (9.996, "10.0"), (12345.0, "12,345"), (-1.5, "-1.50")])
def test_numbers_have_three_significant_digits(value, text):
    assert significant(value) == text


def test_a_spread_is_shown_where_its_ends_differ():
    assert [shown(spread(2.0, 1.5, 2.5)), shown(spread(2.0), "*"), shown(None)] == ["2.00 (1.50..2.50)", "2.00*", ""]
