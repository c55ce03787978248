"""A reader for the GPU -> ONNX: encoder, cross_kv and the parts of the decoder step in half precision, and the bias tables.

These are what export/engine.py compiles for TensorRT and what ONNX Runtime's CUDA provider runs as they are. The precision is in the
graphs' own types, so that a strongly typed compiler needs no flag.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch

from serving.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from serving.step_parts import packed_cross_kv_tensors, step_part_tensors, step_parts
from serving.tensors import GraphTensors, encoder_tensors

from .checkpoint import Checkpoint
from .graphs import EncoderGraph, engine_sizes
from .half import DTYPES, Scales, measured_scales, to_half
from .model import Reader
from .onnx_graph import OPSET, ExportError, describe_reader, onnx_from_module, require_fitting_tokenizer
from .onnx_passes import to_opset_17
from .staging import replacing
from .step_parts import PackedCrossKVGraph, StepPartGraph, relative_bias_by_distance

GpuGraph = EncoderGraph | PackedCrossKVGraph | StepPartGraph
# Head widths that the attention kernels are written for: the vectors of a key must fill groups of lanes.
HEAD_WIDTHS = (8, 16, 32, 64, 128)


def gpu_graphs(reader: Reader) -> Iterator[tuple[str, GpuGraph, GraphTensors]]:
    """Name, module and tensors of each graph, one at a time, since each copies the weights it uses."""
    sizes = engine_sizes(reader.config)
    yield "encoder", EncoderGraph(reader), encoder_tensors(sizes, "float16")
    yield "cross_kv", PackedCrossKVGraph(reader), packed_cross_kv_tensors(sizes)
    for part in step_parts(sizes):
        yield part.name, StepPartGraph(reader, part), step_part_tensors(sizes, part)


class HalfBorders(torch.nn.Module):
    """A graph whose half-precision tensors cross its border as float16 whatever they are inside."""

    def __init__(self, graph: GpuGraph, tensors: GraphTensors):
        super().__init__()
        self.inner = graph
        self.halves = [spec.dtype == "float16" for spec in tensors.outputs]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As the graph's own."""
        made = self.inner(*tensors)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(m.to(torch.float16) if half else m for m, half in zip(made, self.halves, strict=True))


@torch.no_grad()
def export_gpu_reader(checkpoint: Checkpoint, directory: Path, precision: str = "float16", opset: int = OPSET - 1) -> Manifest:
    """Write the graphs, tokenizer.json, the bias tables and manifest.json; all of them or none.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        precision: "float16", or "bfloat16" for engines that have it (TensorRT 10 and later).
        opset: 17 for TensorRT 8.6; 18 and later as the exporter writes them.

    Raises:
        ExportError: if a graph is not as specified, or the reader's heads are of a width that the attention kernels do not have.
        CheckpointError: if the tokenizer has tokens without an embedding. `directory` is as before in either case.
    """
    require_fitting_tokenizer(checkpoint)
    reader = checkpoint.reader
    width = reader.config.decoder.d_kv
    if width not in HEAD_WIDTHS:
        raise ExportError(f"d_kv of the decoder: wanted one of {HEAD_WIDTHS} for the GPU's attention kernels, got {width}")
    with replacing(directory) as beside:
        scales, seconds = measured_scales(reader), {}
        for name, graph, tensors in gpu_graphs(reader):
            started = time.perf_counter()
            export_half(graph, tensors, beside / f"{name}.onnx", scales, precision, opset)
            seconds[name] = round(time.perf_counter() - started, 2)
        (beside / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        for name, table in relative_bias_by_distance(reader).items():
            np.save(beside / f"{name}.npy", table.numpy(), allow_pickle=False)
        manifest = describe_reader(checkpoint, beside, opset, seconds)
        notes = {"scales": {stack: dataclasses.asdict(scale) for stack, scale in scales.items()}}
        manifest = dataclasses.replace(manifest, engine="onnxruntime-gpu", precision=precision, provenance={**manifest.provenance, **notes})
        (beside / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def export_half(graph: GpuGraph, tensors: GraphTensors, path: Path, scales: dict[str, Scales], precision: str, opset: int) -> None:
    """Rescale and cast one graph, export it, and bring it to the older opset where asked for."""
    dtype = DTYPES[precision]
    to_half(graph, scales, dtype)
    module = graph if precision == "float16" else HalfBorders(graph, tensors)
    onnx_from_module(module, tensors, path, max(opset, OPSET))
    if opset < OPSET:
        model = onnx.load(str(path))
        to_opset_17(model)
        onnx.save(model, str(path), save_as_external_data=model.ByteSize() > 1_500_000_000, location=f"{path.name}.data")
