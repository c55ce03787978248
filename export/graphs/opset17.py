"""Rewrites exported graphs for TensorRT 8.6, which reads opset 17, while torch's exporter writes 18 and later only.

Comes in: an opset 18 graph. Goes out: the same graph in opset 17, changed in place. The exporter uses little of 18: the axes of Reduce*
are an input where 17 has an attribute, and Split has one attribute more. TensorRT 8.6 also has gaps in opset 17 itself: it ignores the
range of a Shape, and has no Clip of integers. Both are rewritten with operators that it supports.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.errors import PassError

TENSORRT_OPSET = 17
# Operators of the exported graphs whose form changed between 17 and 18; they are rewritten here.
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
# Operators that 18 changed and that are not rewritten; the exported graphs have none of them.
CHANGED = ("Pad", "Resize", "ScatterElements", "ScatterND", "OptionalGetElement", "OptionalHasElement", "CenterCropPad", "Col2Im", "Mish")


def to_opset_17(model: onnx.ModelProto) -> None:
    """Rewrite an opset 18 graph in place.

    Raises:
        PassError: if the graph has another opset, computes the axes of a reduction, or uses an operator of CHANGED.
    """
    default = next(entry for entry in model.opset_import if entry.domain == "")
    if default.version != TENSORRT_OPSET + 1:
        raise PassError(f"opset: wanted {TENSORRT_OPSET + 1}, got {default.version}")
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = next(a.t for a in node.attribute if a.name == "value")
    for node in graph.node:
        if node.op_type in REDUCTIONS and len(node.input) > 1:
            if node.input[1] not in constants:
                raise PassError(f"{node.name}: axes of {node.op_type}: opset 17 wants constants, got the computed {node.input[1]}")
            axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
            del node.input[1:]
            node.attribute.append(helper.make_attribute("axes", axes))
            kept = [a for a in node.attribute if a.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif node.op_type == "Split":
            kept = [a for a in node.attribute if a.name != "num_outputs"]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif node.op_type in CHANGED:
            raise PassError(f"{node.name}: {node.op_type} changed in opset 18, and there is no rewrite to 17")
    _replace_unsupported(graph)
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)
    default.version = TENSORRT_OPSET
    model.ir_version = min(model.ir_version, 8)  # of ONNX 1.12, which TensorRT 8.6 was built against


def _replace_unsupported(graph: onnx.GraphProto) -> None:
    """Shape with a range -> Shape and Slice. Clip -> Max and Min; without bounds, Identity."""
    nodes = []
    for i, node in enumerate(graph.node):
        bounds = {a.name: a.i for a in node.attribute}
        if node.op_type == "Shape" and bounds:
            names = [f"{node.output[0]}_{what}" for what in ("whole", "start", "end")]
            ends = (bounds.get("start", 0), bounds.get("end", np.iinfo(np.int32).max))
            graph.initializer.extend(
                numpy_helper.from_array(np.array([end], np.int64), name) for name, end in zip(names[1:], ends, strict=True)
            )
            nodes.append(helper.make_node("Shape", node.input, names[:1], name=f"{node.name}_whole"))
            nodes.append(helper.make_node("Slice", names, node.output, name=node.name or f"slice_{i}"))
        elif node.op_type == "Clip":
            value = node.input[0]
            limits = [(op, name) for op, name in zip(("Max", "Min"), node.input[1:], strict=False) if name]
            if not limits:
                nodes.append(helper.make_node("Identity", [value], node.output, name=node.name))
            for j, (op, name) in enumerate(limits):
                output = node.output[0] if j == len(limits) - 1 else f"{node.output[0]}_above"
                nodes.append(helper.make_node(op, [value, name], [output], name=f"{node.name}_{op}"))
                value = output
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
