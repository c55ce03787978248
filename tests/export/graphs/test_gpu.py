"""Graphs for the GPU, run on the CPU: in half precision they do what the fp32 engines do, whatever the size of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.checkpoint.files import Checkpoint
from export.errors import ExportError
from export.graphs.fp16_scaling import measured_scales
from export.graphs.gpu import export_gpu_reader
from export.graphs.onnx_export import export_reader
from export.model.reader import Reader
from serving.contract.manifest import Manifest
from serving.engines.cpu import OnnxDecoder, OnnxEncoder
from tests.conftest import FID, FIDO, RELEASED_FID, random_passages, random_reader, wide
from tests.serving.engines.numpy_encoder import NumpyEncoder
from tests.serving.engines.numpy_step import NumpyStep

WIDE = {name: wide(config) for name, config in {"fid": FID, "fido": FIDO, "released_fid": RELEASED_FID}.items()}
STEPS = 6


def outgrown(reader: Reader, factor: float) -> Reader:
    """The same function with a residual stream `factor` times as large, in both stacks, and feed-forward activations too."""
    assert not reader.config.tie_word_embeddings and not reader.config.scale_decoder_outputs
    config = dataclasses.replace(reader.config, layer_norm_epsilon=reader.config.layer_norm_epsilon * factor**2)
    large = Reader(config)
    large.load_state_dict(reader.state_dict())
    with torch.no_grad():
        for name, weight in large.named_parameters():
            if name.endswith(("embedding.weight", ".o.weight", ".wo.weight")):
                weight.mul_(factor)
            if name.endswith("wi_1.weight"):
                weight.mul_(factor)
            if name.endswith(".wo.weight"):
                weight.div_(factor)
    return large.eval()


def exported(reader: Reader, directory: Path, tokenizer_json: str) -> tuple[Path, Path]:
    checkpoint = Checkpoint(reader, tokenizer_json, "test", "own")
    export_reader(checkpoint, directory / "cpu")
    export_gpu_reader(checkpoint, directory / "gpu")
    export_gpu_reader(checkpoint, directory / "whole", whole_encoder=True)
    return directory / "cpu", directory / "gpu"


def errors(cpu: Path, gpu: Path) -> dict[str, float]:
    """Worst differences of the half-precision graphs to the fp32 engines: hidden states relative to the largest, log-probabilities."""
    manifest = Manifest.load(cpu)
    ids, mask = (array[0].numpy().astype(np.int32) for array in random_passages(4, 24, seed=5))
    (wanted,) = OnnxEncoder(cpu, manifest).encode([(ids, mask)])
    whole = ort.InferenceSession(str(gpu.with_name("whole") / "encoder.onnx"))
    valid = mask.astype(bool)
    hidden, places = wanted[valid], np.flatnonzero(mask).astype(np.int32)
    worst = {"encoder": 0.0}
    for found in (NumpyEncoder(gpu, Manifest.load(gpu)).encode(ids, mask), *whole.run(None, {"input_ids": ids, "attention_mask": mask})):
        assert found.dtype == np.float16 and np.isfinite(found[valid]).all()
        worst["encoder"] = max(worst["encoder"], float(np.abs(found[valid] - hidden).max() / np.abs(hidden).max()))
    reference, decoder = OnnxDecoder(cpu, manifest, 3), NumpyStep(gpu, Manifest.load(gpu), 3)
    for engine in (reference, decoder):
        engine.admit(0, 0, hidden, places)
        engine.admit(1, 1, hidden[7:], places[7:])
        engine.admit(2, 2, hidden[3:], places[3:])
        engine.move(2, 0)
    tokens, penalty = np.zeros(2, np.int32), np.full(2, -1e9, np.float32)
    worst |= {"log_prob": 0.0, "cross_attention": 0.0}
    for position in range(STEPS):
        at = np.full(2, position, np.int32)
        want, got = reference.step(tokens, at, penalty), decoder.step(tokens, at, penalty)
        assert np.isfinite(got[1]).all()
        worst["log_prob"] = max(worst["log_prob"], float(np.abs(want[1] - got[1]).max()))
        row, length = 1, len(hidden) - 7
        worst["cross_attention"] = max(worst["cross_attention"], float(np.abs(want[2][row, :length] - got[2][row, :length]).max()))
        tokens = want[0]
    return worst


@pytest.mark.parametrize("name", list(WIDE))
def test_half_precision_in_parts_equals_fp32_whole(name: str, tmp_path: Path, tokenizer_json: str) -> None:
    found = errors(*exported(random_reader(WIDE[name]), tmp_path, tokenizer_json))
    assert found["encoder"] < 5e-3 and found["log_prob"] < 2e-2 and found["cross_attention"] < 1e-2, found


def test_weights_that_overflow_plain_fp16_do_not_overflow_ours(tmp_path: Path, tokenizer_json: str) -> None:
    large = outgrown(random_reader(WIDE["fido"]), 2.0**15)
    ids, _ = random_passages(2, 16, seed=1)
    with torch.no_grad():
        residual = large.embedding(ids[0])
        plain = large.encoder.layers[0](residual, torch.zeros(1, 1, 1, 1), 0.0)
    assert float(plain.abs().max()) > 65504, "the weights were meant to overflow fp16"
    assert max(scale.residual for scale in measured_scales(large).values()) < 1
    found = errors(*exported(large, tmp_path, tokenizer_json))
    assert found["encoder"] < 5e-3 and found["log_prob"] < 2e-2, found


def test_ordinary_weights_are_left_as_they_are() -> None:
    assert {scale for stack in measured_scales(random_reader(FID)).values() for scale in dataclasses.astuple(stack)} == {1.0}


def test_graphs_are_of_the_opset_that_tensorrt_8_6_reads(tmp_path: Path, tokenizer_json: str) -> None:
    manifest = export_gpu_reader(Checkpoint(random_reader(WIDE["fido"]), tokenizer_json, "test", "own"), tmp_path / "gpu")
    assert manifest.on_gpu and manifest.precision == "float16"
    for file in manifest.files:
        if file.endswith(".onnx"):
            model = onnx.load(str(tmp_path / "gpu" / file))
            onnx.checker.check_model(model)
            assert model.opset_import[0].version == 17
            assert not [node.op_type for node in model.graph.node if node.op_type == "Clip" or (node.op_type == "Shape" and node.attribute)]


def test_sizes_that_the_kernels_do_not_have_are_refused(tmp_path: Path, tokenizer_json: str) -> None:
    faults = (
        r"d_kv of the decoder: wanted one of[\s\S]*d_kv of the encoder: wanted one of[\s\S]*d_ff of the encoder: wanted a multiple of 8"
    )
    with pytest.raises(ExportError, match=faults):
        export_gpu_reader(Checkpoint(random_reader(FID), tokenizer_json, "test", "own"), tmp_path / "gpu")
    assert not list(tmp_path.iterdir())
