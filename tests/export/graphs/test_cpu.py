"""The exported graphs against the module, in ONNX Runtime and OpenVINO: cached step = full pass, packed = padded, batch of n = n of one."""

from __future__ import annotations

import collections
import dataclasses
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.compare import compare_stages
from export.graphs.onnx_export import OPSET
from export.manifest_writer import write_manifest
from serving.contract.manifest import Manifest, ManifestError, sha256_of_file
from serving.engines import cpu
from serving.engines.cpu import CpuDecoder, CpuEncoder
from serving.engines.load import cpu_engines
from tests.conftest import CONFIGS, CPU_BACKENDS, WITHOUT_BF16, WITHOUT_OPENVINO, random_passages
from tests.export.model import numpy_reader
from tests.export.model.test_parity import numpy_arguments, numpy_sizes

STEPS = 9
STEP_AXES = {"batch", "questions", "beams", "past_length", "encoder_sequence_length"}


def loaded(directory: Path, backend: str, slots: int, precision: str = "float32") -> tuple[CpuEncoder, CpuDecoder]:
    """The engines of exported graphs on one backend."""
    manifest = dataclasses.replace(Manifest.load(directory), engine=backend, precision=precision)
    encoder, decoder = cpu_engines(directory, manifest)
    return encoder(directory, manifest), decoder(directory, manifest, slots)


def decode(decoder: CpuDecoder, batch: list[tuple[np.ndarray, np.ndarray]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers of exactly STEPS tokens for (packed hidden states, positions) of each question, all in one batch."""
    for slot, (hidden, positions) in enumerate(batch):
        decoder.admit(slot, slot, hidden, positions)
    tokens = np.zeros(len(batch), np.int32)
    answers: list[list[int]] = [[] for _ in batch]
    scores: list[list[float]] = [[] for _ in batch]
    for step in range(STEPS):
        penalty = np.full(len(batch), -1e9 if step < STEPS - 1 else 0.0, np.float32)
        tokens, log_probs, _ = decoder.step(tokens, np.full(len(batch), step, np.int32), penalty)
        for row in range(len(batch)):
            answers[row].append(int(tokens[row]))
            scores[row].append(float(log_probs[row]))
    return answers, scores


def packed(encoder: CpuEncoder, ids: torch.Tensor, mask: torch.Tensor, passage_length: int) -> tuple[np.ndarray, np.ndarray]:
    (hidden,) = encoder.encode([(ids.int().numpy(), mask.int().numpy())])
    passage, offset = np.nonzero(mask.numpy())
    return hidden[mask.numpy().astype(bool)], (passage * passage_length + offset).astype(np.int32)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_cached_steps_equal_the_padded_full_pass(engines, name, backend):
    checkpoint, directory = engines[name]
    encoder, decoder = loaded(directory, backend, slots=4)
    length = CONFIGS[name].passage_length
    questions = [random_passages(n, length, seed)[0:2] for seed, n in enumerate((1, 3, 7))]
    wanted = [checkpoint.reader.generate(ids, mask, STEPS, min_new_tokens=STEPS) for ids, mask in questions]
    batch = [packed(encoder, ids[0], mask[0], length) for ids, mask in questions]
    answers, scores = decode(decoder, batch)
    assert answers == [w.tokens[0] for w in wanted]
    np.testing.assert_allclose(scores, [w.log_probs[0] for w in wanted], atol=1e-4)
    for question, answer in zip(batch, answers, strict=True):  # alone, in a decoder that has served others before
        assert decode(decoder, [question])[0] == [answer]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_evidence_equals_the_first_tokens_attention_in_numpy(engines, name, backend):
    checkpoint, directory = engines[name]
    config = CONFIGS[name]
    ids, mask = random_passages(4, config.passage_length, 3)
    seen: list[np.ndarray] = []
    start = torch.tensor([[config.decoder_start_token_id]])
    numpy_reader.logits(*numpy_arguments(checkpoint.reader, ids, mask, start), **numpy_sizes(config), attribution=seen)
    wanted = np.sum(seen, axis=0) / len(config.cross_attention_layers)
    encoder, decoder = loaded(directory, backend, slots=2)
    decoder.admit(0, 0, *packed(encoder, ids[0], mask[0], config.passage_length))
    _, _, attention = decoder.step(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32))
    np.testing.assert_allclose(attention[0, : len(wanted)], wanted, atol=1e-5)
    assert attention[0].sum() == pytest.approx(config.decoder.num_heads, abs=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_stage_equals_the_one_before(engines, name, backend, tmp_path):
    checkpoint, directory = engines[name]
    shutil.copytree(directory, tmp_path / "engines")
    write_manifest(dataclasses.replace(Manifest.load(directory), engine=backend), tmp_path / "engines")
    errors = compare_stages(checkpoint, tmp_path / "engines")
    assert {e.stage for e in errors} == {"graph vs module", f"{'onnx' if backend == 'onnxruntime' else 'openvino'} vs graph"}
    assert [e for e in errors if not e.ok] == []
    assert max(e.worst for e in errors) < 1e-4


def test_compare_finds_a_wrong_weight_and_refuses_engines_of_other_weights(engines, tmp_path):
    checkpoint, directory = engines["fido"]
    with pytest.raises(ManifestError, match="made of weights"):
        compare_stages(engines["fid"][0], directory)
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    model = onnx.load(str(broken / "decoder_step.onnx"))
    changed = max((i for i in model.graph.initializer if len(i.dims) == 2), key=lambda i: len(i.raw_data))
    changed.raw_data = (np.frombuffer(changed.raw_data, np.float32) * 1.05).tobytes()
    onnx.save(model, str(broken / "decoder_step.onnx"))
    with pytest.raises(ManifestError, match=r"decoder_step.onnx: SHA-256 wanted"):
        compare_stages(checkpoint, broken)
    manifest = Manifest.load(broken)
    manifest.files["decoder_step.onnx"] = sha256_of_file(broken / "decoder_step.onnx")
    (broken / "manifest.json").write_text(manifest.to_json())
    assert [e.output for e in compare_stages(checkpoint, broken) if not e.ok]


def test_graphs_have_dynamic_axes_and_the_opset_asked_for(engines):
    _, directory = engines["fido"]
    for name, axes in (("encoder", {"passages", "passage_length"}), ("decoder_step", STEP_AXES)):
        model = onnx.load(str(directory / f"{name}.onnx"))
        found = {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
        assert found == axes
        assert model.opset_import[0].version == OPSET


def test_multi_query_keys_are_never_copied_once_per_head(engines):
    """Expanding K or V to all heads would undo multi-query attention: no node but the two gemms may read the cross cache."""
    _, directory = engines["fido"]
    graph = onnx.load(str(directory / "decoder_step.onnx")).graph
    for name in ("past_key_values.1.encoder.key", "past_key_values.1.encoder.value"):
        readers = {node.op_type for node in graph.node if name in node.input}
        assert readers <= {"MatMul", "Transpose", "Shape"}, readers


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_encoder_groups_passages_of_like_length_and_changes_nothing(engines, backend):
    checkpoint, directory = engines["fid"]
    encoder, _ = loaded(directory, backend, slots=1)
    batch = [random_passages(n, 20, n) for n in (2, 9, 5)]
    together = encoder.encode([(ids[0].int().numpy(), mask[0].int().numpy()) for ids, mask in batch])
    for (ids, mask), hidden in zip(batch, together, strict=True):
        wanted, _ = checkpoint.reader.encode(ids, mask)
        valid = mask[0].bool().numpy()
        np.testing.assert_allclose(hidden[valid], wanted.detach().reshape(*valid.shape, -1).numpy()[valid], atol=1e-5)
        assert not hidden[~valid].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_calls_at_the_same_time_change_nothing_and_an_error_of_one_is_raised(engines, backend, monkeypatch):
    checkpoint, directory = engines["fid"]
    monkeypatch.setattr(cpu, "MIN_TOKENS_PER_CALL", 1)
    monkeypatch.setattr(cpu, "lanes_of", lambda threads: 3)
    encoder, _ = loaded(directory, backend, slots=1)
    run, fails, inside, most = encoder._session.run, [], collections.Counter[int](), [0]
    together, begun = threading.Barrier(3, timeout=30), set[int]()  # no lane ends its first call before all have begun theirs

    def watched(inputs, *, lane):
        inside[lane] += 1
        assert inside[lane] == 1, "a lane is called from one thread at a time"
        most[0] = max(most[0], sum(inside.values()))
        try:
            if n_passages == 12 and lane not in begun:
                begun.add(lane)
                together.wait()
            if lane in fails:
                raise RuntimeError(f"lane {lane}")
            return run(inputs, lane=lane)
        finally:
            inside[lane] -= 1

    monkeypatch.setattr(encoder._session, "run", watched)
    for seed, n_passages in enumerate((12, 1, 2)):
        ids, mask = random_passages(n_passages, 20, seed)
        question = ids[0].int().numpy(), mask[0].int().numpy()
        for lane in (0, 2) if n_passages == 12 else ():
            fails.append(lane)
            begun.clear()
            with pytest.raises(RuntimeError, match=f"lane {lane}"):
                encoder.encode([question])
            fails.clear()
        begun.clear()
        (hidden,) = encoder.encode([question])
        wanted, _ = checkpoint.reader.encode(ids, mask)
        valid = mask[0].bool().numpy()
        np.testing.assert_allclose(hidden[valid], wanted.detach().reshape(*valid.shape, -1).numpy()[valid], atol=1e-5)
    assert most == [3]


def test_every_lane_is_called_first_by_the_thread_that_loads_the_encoder(engines, monkeypatch):
    """Two first calls of OpenVINO's binding at once wait for each other for ever: one export in six hung."""
    _, directory = engines["fid"]
    called = []

    class Watched(cpu.OnnxSession):
        def run(self, inputs, *, logits=False, lane=0):
            called.append((lane, threading.current_thread()))
            return super().run(inputs, logits=logits, lane=lane)

    monkeypatch.setattr(cpu, "lanes_of", lambda threads: 3)
    monkeypatch.setattr(cpu.OnnxEncoder, "session_type", Watched)
    loaded(directory, "onnxruntime", slots=1)
    assert called == [(lane, threading.current_thread()) for lane in range(3)]


@WITHOUT_BF16
@WITHOUT_OPENVINO
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_differs_by_its_rounding_alone(engines, name):
    """Eight bits of mantissa, so 0.4% a rounding: hidden states, log-probabilities and evidence stay near fp32's at every step."""
    _, directory = engines[name]
    fp32, bf16 = (loaded(directory, "openvino", 2, precision) for precision in ("float32", "bfloat16"))
    ids, mask = random_passages(5, CONFIGS[name].passage_length, 11)
    (wanted, positions), (got, _) = (packed(encoder, ids[0], mask[0], CONFIGS[name].passage_length) for encoder, _ in (fp32, bf16))
    error = np.linalg.norm(wanted - got) / np.linalg.norm(wanted)
    assert got.dtype == np.float32 and 0 < error < 0.02, "0: it did not run in bf16"
    for _, decoder in (fp32, bf16):
        for slot in range(2):
            decoder.admit(slot, slot, wanted, positions)
    for step in range(STEPS):
        arguments = (np.full(2, 7, np.int32), np.full(2, step, np.int32), np.zeros(2, np.float32))
        (_, log_probs, evidence), (_, rounded, rounded_evidence) = (decoder.step(*arguments) for _, decoder in (fp32, bf16))
        np.testing.assert_allclose(rounded, log_probs, atol=0.15)
        np.testing.assert_allclose(rounded_evidence[:, : len(wanted)], evidence[:, : len(wanted)], atol=0.1)
