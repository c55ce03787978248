"""The cost model against numbers worked by hand, the paper's approximations, and what the server reserves."""

from __future__ import annotations

import dataclasses
import json

import pytest

from export.checkpoint.config import ReaderConfig, StackConfig, reader_preset
from export.checkpoint.files import save_reader
from export.checkpoint.weights import expected_shapes
from export.graphs.cpu import engine_sizes
from perf.bounds import ablation, stages
from perf.bounds.cost import (
    H200,
    Cost,
    HardwareSpec,
    Workload,
    cross_kv_bytes,
    cross_kv_cost,
    cross_kv_multiplications_paper,
    decoder_cost,
    encoder_cost,
    encoder_multiplications_paper,
    largest_batch,
    self_kv_bytes,
    step_cost,
    step_parts,
    step_weights,
)
from perf.bounds.rates import hardware_spec_of
from perf.gpu import forms

PAPER = Workload(batch=24, n_passages=40, passage_length=256, new_tokens=32)
ONE = dataclasses.replace(PAPER, batch=1)

# d = 4 = 2 heads of 2; one encoder layer, two decoder layers of which the second cross-attends; one key/value head
TINY = ReaderConfig(
    encoder=StackConfig(4, 2, 5, 1, 2, 2),
    decoder=StackConfig(4, 2, 3, 2, 2, 1),
    vocab_size=10,
    encoder_decoder_attention_period=2,
)


def test_tiny_encoder_by_hand():
    # weights: q, k, v, o 4 x 16, gated MLP 3 x 4 x 5 = 60 -> 124; 2 questions x 3 passages x 7 tokens = 42 tokens
    # scores and mixing: 42 tokens x 7 keys x 4 wide x 2 = 2352 multiplications
    cost = encoder_cost(TINY, Workload(2, 3, 7, 5), 2)
    assert cost.flops == 2 * (42 * 124 + 2352)
    assert cost.bytes == 2 * (124 + 4 * 42 * 4)


def test_tiny_cross_keys_and_values_by_hand():
    # one layer, k and v map 4 -> 2: 16 weights; 21 tokens a question, 2 x 2 numbers each
    work = Workload(2, 3, 7, 5)
    assert cross_kv_cost(TINY, work, 2).flops == 2 * 42 * 16
    assert cross_kv_bytes(TINY, work, 2) == 21 * 4 * 2


def test_tiny_step_by_hand():
    # a layer: q and o 32, k and v 16, MLP 36 = 84; two layers 168; cross q and o 32; head 40
    work = Workload(2, 3, 7, 6)
    assert step_weights(TINY) == 168 + 32 + 40
    parts = step_parts(TINY, work, 2)
    assert parts["weights"] == Cost(2 * 2 * 240, 2 * 240)
    assert parts["cross_attention"] == Cost(2 * 2 * 2 * 21 * 4, 2 * 21 * 4 * 2)
    assert parts["self_attention"] == Cost(2 * 2 * 2 * 2 * 3 * 4, 2 * (2 * 2 * 2 * 3) * 2)
    assert decoder_cost(TINY, work, 2).flops == cross_kv_cost(TINY, work, 2).flops + 6 * step_cost(TINY, work, 2).flops


@pytest.mark.parametrize("period", [1, 2, 3, 6, 12])
def test_the_papers_approximations_fall_out(period):
    """With d_ff = 4 d ungated, multi-head, and passages short beside d, the exact counts approach 12 n d^2 L and 2 n d^2 L / K."""
    base = reader_preset("base", fido=False, period=period)
    stack = dataclasses.replace(base.encoder, d_ff=4 * base.encoder.d_model)
    config = dataclasses.replace(base, encoder=stack, feed_forward_proj="relu")
    short = Workload(1, 40, 8, 32)
    assert encoder_cost(config, short, 2).flops / 2 == pytest.approx(encoder_multiplications_paper(config, short), rel=0.01)
    assert cross_kv_cost(config, short, 2).flops / 2 == pytest.approx(cross_kv_multiplications_paper(config, short), rel=1e-9)


@pytest.mark.parametrize("fido", [False, True])
def test_a_step_reads_every_decoder_weight_but_those_of_the_cross_keys_and_values(fido):
    config = reader_preset("base-xl", fido=fido)
    shapes = {name: shape for name, shape in expected_shapes(config).items() if len(shape) == 2}
    counted = sum(
        a * b
        for n, (a, b) in shapes.items()
        if n.startswith("decoder.layers") and "cross_attention.k" not in n and "cross_attention.v" not in n
    )
    assert step_weights(config) == counted + config.vocab_size * config.decoder.d_model


@pytest.mark.parametrize("fido", [False, True])
def test_bytes_of_keys_and_values_are_those_the_server_counts(fido):
    config = reader_preset("base", fido=fido)
    sizes = engine_sizes(config)
    assert cross_kv_bytes(config, ONE, 2) == 40 * 256 * sizes.cross_kv_bytes_per_token(2)
    assert self_kv_bytes(config, 32, 2) == 32 * sizes.self_kv_bytes_per_token(2)


def test_known_figures_of_the_base_size():
    fid, fido = reader_preset("base", fido=False), reader_preset("base", fido=True)
    assert cross_kv_bytes(fid, ONE, 2) == 377_487_360
    assert cross_kv_bytes(fid, ONE, 2) == 72 * cross_kv_bytes(fido, ONE, 2)
    # the encoder is the larger part of both; FiD's step is bound by its bytes, FiDO's by its weights
    assert encoder_cost(fid, PAPER, 2).bound_s(H200) * 1e3 == pytest.approx(60, abs=8)
    assert step_cost(fid, PAPER, 2).bound_s(H200) * 1e3 == pytest.approx(2.17, abs=0.05)
    assert step_cost(fido, PAPER, 2).bound_s(H200) * 1e3 == pytest.approx(0.075, abs=0.01)
    parts = step_parts(fido, PAPER, 2)
    assert parts["weights"].bytes > parts["cross_attention"].bytes
    assert step_parts(fid, PAPER, 2)["cross_attention"].flops_per_byte == pytest.approx(1.0)


def test_a_bound_is_the_slower_of_computing_and_moving():
    spec = HardwareSpec("x", 100.0, 10.0)
    assert Cost(1000, 10).bound_s(spec) == 10 and Cost(10, 1000).bound_s(spec) == 100
    assert (Cost(1, 2) + Cost(3, 4)) * 2 == Cost(8, 12)


def test_fido_fits_larger_batches():
    fid, fido = reader_preset("base", fido=False), reader_preset("base", fido=True)
    assert largest_batch(fid, PAPER, 2, 32 * 10**9, 250_000_000) == 83
    assert largest_batch(fido, PAPER, 2, 32 * 10**9, 210_000_000) > 50 * 83


# Stage benchmark and ablation on tiny readers: every number is there, adds up, and the arithmetic beside it is right.

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


def test_two_forms_of_the_engines_are_measured_in_turns(engines, tmp_path):
    folders = []
    for form in forms.FORMS:
        folders.append(tmp_path / form)
        folders[-1].mkdir()
        for reader in stages.READERS:
            (folders[-1] / reader).symlink_to(engines[reader][1])
    points = [{"model": reader, "load": 8, "questions_per_s": number} for number, reader in enumerate(stages.READERS, 5)]
    (folders[1] / "sweep.json").write_text(json.dumps({"points": points}))
    (folders[0] / "sweep.json").write_text(json.dumps({"points": []}))
    out, options = tmp_path / "whole.json", ["--plan", "smoke", "--batches", "1", "2", "--rounds", "1", "--steps", "2"]
    assert forms.main([*map(str, folders), "--sweeps", *map(str, folders), *options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [found["whole"][reader]["questions_per_s_in_flight"] for reader in stages.READERS] == [{"8": 5}, {"8": 6}]
    for form in forms.FORMS:
        for reader in stages.READERS:
            assert set(found[form][reader]["step_ms"]) == {"1", "2"} and found[form][reader]["encoder_ms"]["median"] > 0


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
