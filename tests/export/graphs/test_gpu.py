"""Graphs for the GPU, run on the CPU: in half precision they do what the fp32 engines do, whatever the size of the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint.files import Checkpoint
from export.errors import ExportError, PassError
from export.graphs.gemms import measured_scales
from export.graphs.gpu import export_gpu_reader
from export.graphs.onnx_export import export_reader, to_opset_17
from export.model.reader import Reader
from serving.contract.manifest import Manifest
from serving.engines.cpu import OnnxDecoder, OnnxEncoder
from tests.conftest import FID, FIDO, RELEASED_FID, random_passages, random_reader, wide
from tests.serving.engines.numpy_reader import NumpyEncoder, NumpyStep

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


# Rewrites of opset 18 graphs into what TensorRT 8.6 reads: the same numbers, in opset 17.


def model_of(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def run(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([[-2.0, 0.5, 3.0], [4.0, -0.5, 1.0]], np.float32)})[0]


LOW, HIGH = np.float32(0), np.float32(1)


@pytest.mark.parametrize(
    ("inputs", "constants"),
    [
        (["x"], {}),
        (["x", "low"], {"low": LOW}),
        (["x", "", "high"], {"high": HIGH}),
        (["x", "low", "high"], {"low": LOW, "high": HIGH}),
        (["x", "", ""], {}),
    ],
    ids=["no bounds", "low", "high", "both", "empty bounds"],
)
def test_clip_is_rewritten_with_every_set_of_bounds(inputs: list[str], constants: dict[str, np.ndarray]):
    nodes = [helper.make_node("Clip", inputs, ["c"], name="clip"), helper.make_node("Neg", ["c"], ["y"], name="neg")]
    model = model_of(nodes, **{name: np.asarray(value) for name, value in constants.items()})
    wanted = run(model)
    to_opset_17(model)
    assert "Clip" not in {node.op_type for node in model.graph.node}
    np.testing.assert_array_equal(run(model), wanted)


def test_shape_with_a_range_and_reductions_keep_their_values():
    nodes = [
        helper.make_node("Shape", ["x"], ["width"], name="shape", start=1, end=2),
        helper.make_node("Cast", ["width"], ["width_f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean", keepdims=1),
        helper.make_node("Mul", ["mean", "width_f"], ["y"], name="mul"),
    ]
    model = model_of(nodes, axes=np.array([1], np.int64))
    wanted = run(model)
    to_opset_17(model)
    assert model.opset_import[0].version == 17
    np.testing.assert_array_equal(run(model), wanted)


def test_what_cannot_be_rewritten_is_refused_by_name():
    computed = [
        helper.make_node("Shape", ["x"], ["axes"], name="shape", start=0, end=1),
        helper.make_node("ReduceMax", ["x", "axes"], ["y"], name="largest"),
    ]
    with pytest.raises(PassError, match="largest: axes of ReduceMax: opset 17 wants constants, got the computed axes"):
        to_opset_17(model_of(computed))
    padded = [helper.make_node("Pad", ["x", "pads"], ["y"], name="pad")]
    with pytest.raises(PassError, match="pad: Pad changed in opset 18"):
        to_opset_17(model_of(padded, pads=np.zeros(4, np.int64)))
    empty = helper.make_model(helper.make_graph([], "empty", [], []), opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(PassError, match="opset: wanted 18, got 20"):
        to_opset_17(empty)
