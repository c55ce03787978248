"""torch -> ONNX for the CPU: a reader's three graphs and their tokenizer, in an engine directory.

Comes in: a checkpoint. Goes out: encoder.onnx, cross_kv.onnx, decoder_step.onnx, tokenizer.json and the manifest. Names, dtypes and dynamic
axes of inputs and outputs are those of serving/contract/tensors.py and are checked here. Numbers are checked by export/compare.py.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from export.checkpoint.files import Checkpoint
from export.checkpoint.tokenizer import require_embeddings
from export.errors import ExportError
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
TRACE_LENGTHS = {"passages": 3, "passage_length": 10, "batch": 2, "past_length": 5, "encoder_sequence_length": 7, "tokens": 6}

GRAPHS: dict[str, tuple[Callable[[Reader], nn.Module], Callable[[EngineSizes], GraphTensors]]] = {
    "encoder": (EncoderGraph, encoder_tensors),
    "cross_kv": (CrossKVGraph, cross_kv_tensors),
    "decoder_step": (DecoderStepGraph, decoder_step_tensors),
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
