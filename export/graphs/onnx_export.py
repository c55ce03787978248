"""torch -> ONNX for the CPU: a reader's three graphs and their tokenizer, in an engine directory; opset 17 for TensorRT 8.6.

Comes in: a checkpoint. Goes out: encoder.onnx, cross_kv.onnx, decoder_step.onnx, tokenizer.json and the manifest. Names, dtypes and dynamic
axes of inputs and outputs are those of serving/contract/tensors.py and are checked here. Numbers are checked by export/compare.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from export.checkpoint.files import Checkpoint
from export.checkpoint.tokenizer import require_embeddings
from export.errors import ExportError, PassError
from export.manifest_writer import PROMPT_TEMPLATE as PROMPT_TEMPLATE
from export.manifest_writer import atomic_directory, describe_reader, engine_sizes, write_manifest
from export.model.reader import Reader
from serving.contract.manifest import ENGINE_NAMES, TOKENIZER_FILE, Manifest
from serving.contract.tensors import EngineSizes, GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors

from .cpu import CrossKVGraph, DecoderStepGraph, EncoderGraph

OPSET = 18  # the oldest that torch's exporter writes by itself
# A protobuf message holds at most 2 GiB. Graphs whose weights come near that keep them in a file next to the graph.
EXTERNAL_DATA_BYTES = 1_500_000_000
SLOW_PARAMETERS = 20_000_000  # from here on an export takes a minute or more, and says what it is at
LOG = logging.getLogger("export")
# Lengths of the dynamic axes for tracing. They differ, and none is 1, so that the exporter takes none for a constant.
TRACE_LENGTHS = {
    "passages": 3,
    "passage_length": 10,
    "batch": 2,
    "past_length": 5,
    "encoder_sequence_length": 7,
    "tokens": 6,
    "questions": 4,
    "beams": 8,
}

GRAPHS: dict[str, tuple[Callable[[Reader], nn.Module], Callable[[EngineSizes], GraphTensors]]] = {
    "encoder": (EncoderGraph, encoder_tensors),
    "cross_kv": (CrossKVGraph, cross_kv_tensors),
    "decoder_step": (functools.partial(DecoderStepGraph, beams=True), functools.partial(decoder_step_tensors, beams=True)),
}


def sample_inputs(tensors: GraphTensors, lengths: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs with the names, dtypes and shapes of `tensors`. Every integer is 1: a valid token, mask bit and length."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for spec in tensors.inputs:
        shape = spec.shape(lengths)
        inputs[spec.name] = np.ones(shape, np.int32) if spec.dtype == "int32" else rng.standard_normal(shape).astype(spec.dtype)
    return inputs


def onnx_from_module(module: nn.Module, tensors: GraphTensors, path: Path, opset: int = OPSET) -> None:
    """Export one graph by torch's dynamo exporter and check it against its tensor specs.

    Raises:
        ExportError: if the graph has another opset, other input or output names, or other dynamic axes.
    """
    inputs = tuple(torch.from_numpy(array) for array in sample_inputs(tensors, TRACE_LENGTHS).values())
    dims: dict[str, Any] = {}
    axes: tuple[Any, ...] = tuple(
        {i: dims.setdefault(axis, torch.export.Dim(axis, min=1)) for i, axis in spec.dynamic_axes().items()} for spec in tensors.inputs
    )
    # the exporter wants the shapes of a forward(*tensors) as one tuple
    variadic = module.forward.__code__.co_flags & 0x04
    with _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=(axes,) if variadic else axes,
            input_names=[spec.name for spec in tensors.inputs],
            output_names=[spec.name for spec in tensors.outputs],
            opset_version=opset,
            verbose=False,
        )
        if program is None:
            raise ExportError(f"{path.name}: torch's exporter returned nothing; it may not support this torch version")
        _drop_traces(program.model)
        weight_bytes = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        program.save(str(path), external_data=weight_bytes > EXTERNAL_DATA_BYTES)
    _check(path, tensors, opset)


def _drop_traces(model: Any) -> None:
    """Drop the exporter's notes on where each node came from: they are larger than the graph, and name this machine's files."""
    for part in (model.graph, *model.functions.values()):
        part.metadata_props.clear()
        for node in part:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*part.inputs, *getattr(part, "initializers", {}).values()):
            value.metadata_props.clear()


def _check(path: Path, tensors: GraphTensors, opset: int) -> None:
    model = onnx.load(str(path), load_external_data=False)
    faults = []
    if model.opset_import[0].version != opset:
        faults.append(f"opset: wanted {opset}, got {model.opset_import[0].version}")
    for what, specs, values in (("input", tensors.inputs, model.graph.input), ("output", tensors.outputs, model.graph.output)):
        found = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
        if list(found) != [spec.name for spec in specs]:
            faults.append(f"{what}s: wanted {[spec.name for spec in specs]}, got {list(found)}")
        faults += [f"{what} {s}: axes in the graph are {found[s.name]}" for s in specs if found.get(s.name, s.axes) != s.axes]
    if faults:
        raise ExportError(f"{path.name}: the exported graph is not as specified:\n  " + "\n  ".join(faults))


def export_reader(checkpoint: Checkpoint, directory: Path, opset: int = OPSET) -> Manifest:
    """Write encoder.onnx, cross_kv.onnx, decoder_step.onnx, tokenizer.json and manifest.json: all of them or none.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        opset: of the ONNX graphs.

    Raises:
        ExportError: if a graph differs from its specification.
        CheckpointError: if the tokenizer has tokens without an embedding. In both cases `directory` stays as it was.
    """
    require_fitting_tokenizer(checkpoint)
    with atomic_directory(directory) as tmp_dir:
        sizes = engine_sizes(checkpoint.reader.config)
        seconds = {}
        stage = stages(checkpoint.reader)
        for name, (module_of, tensors_of) in GRAPHS.items():
            stage(f"{name}.onnx")
            started = time.perf_counter()
            onnx_from_module(module_of(checkpoint.reader), tensors_of(sizes), tmp_dir / f"{name}.onnx", opset)
            seconds[name] = round(time.perf_counter() - started, 2)
        (tmp_dir / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        return write_manifest(describe_reader(checkpoint, tmp_dir, opset, seconds), tmp_dir)


def stages(reader: Reader) -> Callable[[str], None]:
    """What logs the stage that an export is at; nothing for readers that take seconds."""
    slow = sum(weight.numel() for weight in reader.parameters()) >= SLOW_PARAMETERS
    started = time.perf_counter()
    return lambda what: LOG.log(logging.INFO if slow else logging.DEBUG, "  %4.0f s: %s", time.perf_counter() - started, what)


def require_fitting_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every token has an embedding."""
    require_embeddings(checkpoint.tokenizer_json, checkpoint.reader.config.vocab_size, checkpoint.source)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the exporter's notes about packages that are not installed and about axis names that it merges."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


assert tuple(GRAPHS) == ENGINE_NAMES


# Rewrites exported graphs for TensorRT 8.6, which reads opset 17, while torch's exporter writes 18 and later only.
#
# Comes in: an opset 18 graph. Goes out: the same graph in opset 17, changed in place. The exporter uses little of 18: the axes of Reduce*
# are an input where 17 has an attribute, and Split has one attribute more. TensorRT 8.6 also has gaps in opset 17 itself: it ignores the
# range of a Shape, and has no Clip of integers. Both are rewritten with operators that it supports.

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
