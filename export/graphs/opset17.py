"""Small rewrites of exported graphs into what TensorRT 8.6 reads: it knows opset 17, and torch's exporter writes no older one than 18.

What the exporter uses of 18 is little: the axes of Reduce* as an input where 17 has an attribute, and an attribute of Split. Of opset 17
itself TensorRT 8.6 overlooks the range of a Shape and has no Clip of integers; both are written with what it has.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

TENSORRT_OPSET = 17
# Operators of the exported graphs whose form changed between 17 and 18, and is brought back here.
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
# Changed in 18 in a way that is not brought back; none is expected.
CHANGED = ("Pad", "Resize", "ScatterElements", "ScatterND", "OptionalGetElement", "OptionalHasElement", "CenterCropPad", "Col2Im", "Mish")


class PassError(RuntimeError):
    """A graph that the rewrite cannot bring to the older opset."""


def to_opset_17(model: onnx.ModelProto) -> None:
    """Rewrite an opset 18 graph in place.

    Raises:
        PassError: if the graph is of another opset, computes the axes of a reduction, or uses an operator that 18 changed otherwise.
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
                raise PassError(f"{node.name}: the axes of {node.op_type} are computed, but opset 17 wants them fixed")
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
            raise PassError(f"{node.name}: {node.op_type} changed in opset 18 and is not brought back to 17")
    _spell_out(graph)
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)
    default.version = TENSORRT_OPSET
    model.ir_version = min(model.ir_version, 8)  # TensorRT 8.6 was built against ONNX 1.12, whose files are of version 8


def _spell_out(graph: onnx.GraphProto) -> None:
    """Shape with a range -> Shape and Slice; Clip -> Max and Min."""
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
            for j, (op, name) in enumerate(limits):
                made = node.output[0] if j == len(limits) - 1 else f"{node.output[0]}_above"
                nodes.append(helper.make_node(op, [value, name], [made], name=f"{node.name}_{op}"))
                value = made
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
