"""Stage benchmark and ablation on tiny readers: every number is there, adds up, and the arithmetic beside it is right."""

from __future__ import annotations

import json

import pytest

from export.checkpoint.files import save_reader
from perf.bounds import ablation, stages
from perf.bounds.cost import Workload, step_cost
from perf.bounds.rates import hardware_spec_of

MACHINE = {"processor": "a processor", "gpu": None, "copy_tb_per_s": {"median": 0.01}, "peak_tflops": {"median": 0.1}}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    return folder


def test_the_hardware_spec_has_the_measured_rates(run):
    spec = hardware_spec_of(run)
    assert (spec.name, spec.bytes_per_s, spec.flops_per_s) == ("a processor", 1e10, 1e11)


def test_stages_take_a_question_apart(run, engines, tmp_path, tokenizer_json):
    folder, tokenizer = tmp_path / "engines", tmp_path / "tokenizer.json"
    folder.mkdir()
    tokenizer.write_text(tokenizer_json)
    checkpoints = []
    for reader in stages.READERS:
        checkpoint, directory = engines[reader]
        (folder / reader).symlink_to(directory)
        save_reader(tmp_path / reader, checkpoint.reader, tokenizer)
        checkpoints += [f"--{reader}", str(tmp_path / reader)]
    points = [
        {"model": reader, "workload": "demo", "mode": "concurrency", "load": 1, "latency_ms": {"p50": 1e4}} for reader in stages.READERS
    ]
    (run / "sweep.json").write_text(json.dumps({"points": points}))
    options = ["--plan", "smoke", "--batches", "1", "2", "--rounds", "2", "--steps", "3"]
    assert stages.main(["--engines", str(folder), "--run", str(run), *checkpoints, *options]) == 0
    found = json.loads((run / "stages.json").read_text())["readers"]
    for reader in stages.READERS:
        entry = found[reader]
        parts = {name: part["median"] for name, part in entry["parts_ms"].items()}
        assert set(parts) == {"tokenize", "encoder", "cross_kv", "decoder_steps", "rest_of_chain", "triton"}
        assert min(parts.values()) >= 0 and parts["triton"] == pytest.approx(1e4 - entry["in_process_ms"]["median"], abs=0.01)
        assert set(entry["step_ms"]) == set(entry["step_bound_ms"]) == {"1", "2"}
        config = engines[reader][0].reader.config
        bound = (
            step_cost(config, Workload(2, entry["passages"], entry["passage_tokens"], entry["new_tokens"]), 4).bound_s(
                hardware_spec_of(run)
            )
            * 1e3
        )
        assert entry["step_bound_ms"]["2"] == pytest.approx(bound, abs=1e-4)
    roofline = json.loads((run / "roofline.json").read_text())["points"]
    assert len(roofline) == 6 and all(point["seconds"] > 0 and point["flops"] > 0 and point["bytes"] > 0 for point in roofline)


def test_the_ablations_rows_are_the_papers_and_what_lies_between():
    rows = ablation.rows_of("base", "xl")
    assert [row.name("base") for row in rows[:4]] == ["FiD", "FiD +LSA-6", "FiD +MQ", "FiD +LSA-6 +MQ"]
    assert {row.period for row in rows if row.decoder == "base"} == {1, 2, 3, 6, 12}
    assert {row.num_kv_heads for row in rows if row.decoder == "base"} == {1, 4, 12}
    assert [row.name("base") for row in rows[-4:]][-1] == "FiD +LSA-6 +MQ, XL decoder" and len({row.key for row in rows}) == len(rows) == 12


def test_an_ablation_measures_the_rows_asked_for_and_bounds_all(run, tmp_path, tokenizer_json):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer_json)
    options = ["--encoder", "small", "--large", "base", "--passages", "2", "--passage-length", "16", "--new-tokens", "4", "--measure", "1"]
    options += ["--batches", "1", "2", "--steps", "2", "--rounds", "1", "--tokenizer", str(tokenizer)]
    assert ablation.main([*options, "--run", str(run)]) == 0
    rows = json.loads((run / "ablation.json").read_text())["rows"]
    assert [row["measured"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert set(rows[0]["step_ms"]) == {"1", "2"} and rows[0]["total_ms_per_question"] > rows[0]["decoder_ms_per_question"] > 0
    assert all(row["step_ms"] is None and row["total_ms_per_question"] is None for row in rows[1:])
    by_key = {row["key"]: row for row in rows}
    assert by_key["small:1:6"]["cross_kv_mb_per_question"] > by_key["small:1:1"]["cross_kv_mb_per_question"]
    assert by_key["small:6:1"]["largest_batch"] > by_key["small:1:6"]["largest_batch"]
