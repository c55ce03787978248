"""Rewrites of opset 18 graphs into what TensorRT 8.6 reads: the same numbers, in opset 17."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import PassError
from export.graphs.opset17 import to_opset_17


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
