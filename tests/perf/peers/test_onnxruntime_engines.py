"""The peer answers as the reader does, batch of n as n of one, and its rows join those that are in the file; CPU engines in turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from perf.peers import cpu_engines, onnxruntime_engines
from perf.peers.onnxruntime_engines import EnginePeer
from perf.report.run_folder import read_run
from perf.report.verdict import summary
from perf.served.workload import Uniform, WorkloadSpec, exactly, random_token_ids
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.engines.load import load_decoder, load_encoder
from serving.engines.packing import HostPacker

LIMITS = Limits(slots=3, max_passages=4)


@pytest.mark.parametrize("reader", ["fid", "fido"])
def test_tokens_are_the_torch_readers(engines, reader):
    checkpoint, directory = engines[reader]
    manifest = Manifest.load(directory)
    peer = EnginePeer(reader, manifest, load_encoder(directory, manifest, LIMITS), load_decoder(directory, manifest, LIMITS), HostPacker())
    questions = [
        (ids, mask)
        for ids, mask, _ in random_token_ids(WorkloadSpec(Uniform(1, 4), Uniform(3, 20), exactly(7)), 3, 5, manifest.sizes.vocab_size)
    ]
    together = peer.answer(questions, 7)
    for (ids, mask), tokens in zip(questions, together, strict=True):
        assert peer.answer([(ids, mask)], 7) == [tokens]
        wanted = checkpoint.reader.generate(torch.from_numpy(ids).long()[None], torch.from_numpy(mask).long()[None], 7, 7)
        assert tokens == wanted.tokens[0]


def test_the_command_adds_rows_and_replaces_its_own(engines, tmp_path, capsys):
    out = tmp_path / "peers.json"
    out.write_text(json.dumps({"peers": [{"name": "another", "reader": "fid", "batch": 1}], "settings": {"seed": 3}}))
    arguments = [word for reader in ("fid", "fido") for word in (f"--{reader}", str(engines[reader][1]))]
    arguments += ["--passages", "2", "--passage-tokens", "5..9", "--new-tokens", "3", "--out", str(out)]
    for rounds in ("1", "2"):
        assert onnxruntime_engines.main([*arguments, "--requests", "2", "--batches", "1", "2", "--rounds", rounds]) == 0
    result = json.loads(out.read_text())
    rows = result["peers"]
    assert [(row["name"], row["reader"], row["batch"]) for row in rows] == [
        ("another", "fid", 1),
        *(("the same graphs, ONNX Runtime, CPU, float32", reader, batch) for batch in (1, 2) for reader in ("fid", "fido")),
    ]
    for row in rows[1:]:
        assert row["questions_per_s"]["min"] > 0 and row["p50_ms"]["median"] > 0 and row["excludes"]
        assert (row["new_tokens"], row["passages"]) == (3, 2)
    assert result["settings"]["seed"] == 3 and result["settings"]["engines, onnxruntime"]["rounds"] == 2
    with pytest.raises(SystemExit):
        onnxruntime_engines.main([*arguments, "--requests", "3", "--batches", "2"])
    assert "multiple of every batch" in capsys.readouterr().err


def test_cpu_engines_run_in_turn_and_gains_are_those_within_a_round(monkeypatch):
    clock, calls = [0.0], []
    # seconds of each call: the second round is on a machine twice as busy
    seconds = {"fp32": [9.0, 2.0, 4.0], "bf16": [9.0, 1.0, 2.0], "pytorch_bf16": [9.0, 4.0, 8.0], "served_bf16": [9.0, 2.0, 4.0]}

    def way(name: str) -> cpu_engines.Way:
        def work(part: str) -> None:
            calls.append(f"{name} {part}")
            clock[0] += seconds[name][sum(call == calls[-1] for call in calls) - 1]

        return cpu_engines.Way(lambda: work("answer"), None if name.startswith("served") else lambda: work("encode"))

    monkeypatch.setattr(cpu_engines.time, "perf_counter", lambda: clock[0])
    found = cpu_engines.measure({name: way(name) for name in seconds}, rounds=2)
    in_process = [name for name in seconds if not name.startswith("served")]
    assert calls[:7] == [*(f"{name} encode" for name in in_process), *(f"{name} answer" for name in seconds)] and len(calls) == 21
    assert found["encoder_ms"]["bf16"] == {"median": 1500.0, "min": 1000.0, "max": 2000.0}
    assert found["encoder_gain"] == {"fp32": 1.0, "bf16": 2.0, "pytorch_bf16": 0.5}
    assert found["fid_gain_over_pytorch_bf16"] == {"fp32": 2.0, "bf16": 4.0, "pytorch_bf16": 1.0, "served_bf16": 2.0}


def test_the_summary_of_a_run_quotes_the_cpu_engines(tmp_path):
    shutil.copy(Path(__file__).parents[3] / "perf" / "results" / "cpu" / "run.json", tmp_path)
    assert "encoder_bf16_ms" not in summary(read_run(tmp_path))
    numbers = {"fp32": {"median": 2.0, "min": 1.0, "max": 3.0}, "pytorch_bf16": {"median": 4.0, "min": 4.0, "max": 4.0}}
    (tmp_path / "cpu_engines.json").write_text(json.dumps({"encoder_ms": numbers, "fid_questions_per_s": numbers}))
    quoted = summary(read_run(tmp_path))
    assert quoted["encoder_fp32_ms"] == quoted["fid_fp32_questions_per_s"] == numbers["fp32"]
    assert quoted["pytorch_bf16_encoder_ms"] == quoted["pytorch_bf16_fid_questions_per_s"] == numbers["pytorch_bf16"]
