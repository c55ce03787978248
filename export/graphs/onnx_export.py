"""torch -> ONNX: a reader's three graphs, their tokenizer and the manifest, built tmp_dir and moved into place.

Input and output names, dtypes and dynamic axes are those of serving/contract/tensors.py. Numbers are checked by compare.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tokenizers import Tokenizer
from torch import nn

from export.atomic_directory import atomic_directory
from export.checkpoint.files import Checkpoint
from export.checkpoint.weights import CheckpointError
from export.model.reader import Reader
from serving.contract.manifest import ENGINE_NAMES, MANIFEST_FILE, TOKENIZER_FILE, Manifest, Prompt, sha256_of_file
from serving.contract.tensors import EngineSizes, GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors

from .cpu import CrossKVGraph, DecoderStepGraph, EncoderGraph, engine_sizes

OPSET = 18
# One protobuf message holds at most 2 GiB; graphs whose weights come near that keep them in a file tmp_dir the graph.
EXTERNAL_DATA_BYTES = 1_500_000_000
PROMPT_TEMPLATE = "question: {question} title: {title} context: {context}"
# Any lengths serve to trace a graph whose axes are dynamic, but equal ones or 1 could be taken for constants.
TRACE_LENGTHS = {"passages": 3, "passage_length": 10, "batch": 2, "past_length": 5, "encoder_sequence_length": 7, "tokens": 6}

GRAPHS: dict[str, tuple[Callable[[Reader], nn.Module], Callable[[EngineSizes], GraphTensors]]] = {
    "encoder": (EncoderGraph, encoder_tensors),
    "cross_kv": (CrossKVGraph, cross_kv_tensors),
    "decoder_step": (DecoderStepGraph, decoder_step_tensors),
}


class ExportError(RuntimeError):
    """The exporter made something other than what was asked for."""


def sample_inputs(tensors: GraphTensors, lengths: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the right names, dtypes and shapes. Integers are 1: a valid token, a set mask bit, a length."""
    rng = np.random.default_rng(seed)
    made = {}
    for spec in tensors.inputs:
        shape = spec.shape(lengths)
        made[spec.name] = np.ones(shape, np.int32) if spec.dtype == "int32" else rng.standard_normal(shape).astype(spec.dtype)
    return made


def onnx_from_module(module: nn.Module, tensors: GraphTensors, path: Path, opset: int = OPSET) -> None:
    """Export one graph by torch's dynamo exporter and check it against its tensor specs.

    Raises:
        ExportError: if the graph's opset, input or output names, or dynamic axes are not those asked for.
    """
    inputs = tuple(torch.from_numpy(array) for array in sample_inputs(tensors, TRACE_LENGTHS).values())
    dims: dict[str, Any] = {}
    axes: tuple[Any, ...] = tuple(
        {i: dims.setdefault(axis, torch.export.Dim(axis, min=1)) for i, axis in spec.dynamic_axes().items()} for spec in tensors.inputs
    )
    # a forward(*tensors) takes its shapes as one tuple for all of them
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
            raise ExportError(f"{path.name}: the exporter returned nothing")
        weight_bytes = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        program.save(str(path), external_data=weight_bytes > EXTERNAL_DATA_BYTES)
    _check(path, tensors, opset)


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
    """Write encoder.onnx, cross_kv.onnx, decoder_step.onnx, tokenizer.json and manifest.json; all of them or none.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        opset: of the ONNX graphs; 18 is the oldest that the exporter writes by itself.

    Raises:
        ExportError: if a graph is not as specified.
        CheckpointError: if the tokenizer has tokens without an embedding. `directory` is as before in either case.
    """
    require_fitting_tokenizer(checkpoint)
    with atomic_directory(directory) as tmp_dir:
        sizes = engine_sizes(checkpoint.reader.config)
        seconds = {}
        for name, (module_of, tensors_of) in GRAPHS.items():
            started = time.perf_counter()
            onnx_from_module(module_of(checkpoint.reader), tensors_of(sizes), tmp_dir / f"{name}.onnx", opset)
            seconds[name] = round(time.perf_counter() - started, 2)
        (tmp_dir / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        manifest = describe_reader(checkpoint, tmp_dir, opset, seconds)
        (tmp_dir / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def require_fitting_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every token has an embedding."""
    rows = checkpoint.reader.config.vocab_size
    largest = max(Tokenizer.from_str(checkpoint.tokenizer_json).get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"{checkpoint.source}: the tokenizer has token id {largest}, but the embedding has {rows} rows; "
            "give the checkpoint's own with --tokenizer"
        )


def describe_reader(checkpoint: Checkpoint, directory: Path, opset: int, seconds: dict[str, float]) -> Manifest:
    """The manifest of fp32 engines for the CPU in `directory`: everything that lies there belongs to them."""
    config = checkpoint.reader.config
    return Manifest(
        reader=config.kind,
        engine="onnxruntime",
        precision="float32",
        sizes=engine_sizes(config),
        prompt=Prompt(PROMPT_TEMPLATE, config.passage_length, config.append_eos),
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        files={file.name: sha256_of_file(file) for file in sorted(directory.iterdir())},
        weights_sha256=sha256_of_weights(checkpoint.reader),
        provenance={
            "source": Path(checkpoint.source).name,
            "layout": checkpoint.layout,
            "parameters": sum(p.numel() for p in checkpoint.reader.parameters()),
            "opset": opset,
            "export_s": seconds,
            "versions": {"torch": torch.__version__, "onnx": onnx.__version__},
        },
    )


def sha256_of_weights(reader: Reader) -> str:
    """Hex SHA-256 over all weights in order of their names: equal for equal readers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(reader.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about packages that are not installed, and about axis names it merges, off the terminal."""
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
