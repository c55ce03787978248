"""A reader for the GPU -> ONNX: its gemms and cross_kv in half precision, and the arrays of the kernels between them.

TensorRT compiles these graphs (export/tensorrt/compiler.py); ONNX Runtime's CUDA provider runs them as they are. The precision is in
the graphs' own types, so that a strongly typed compiler needs no flag.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper

from export.atomic_directory import atomic_directory
from export.checkpoint.config import ReaderConfig
from export.checkpoint.files import Checkpoint
from export.library.encoder import LibraryOptions, sample_passages, write_encoder_library
from serving.contract.gemms import gemm_tensors, packed_cross_kv_tensors
from serving.contract.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from serving.contract.tensors import GraphTensors, encoder_tensors

from .cpu import EncoderGraph, engine_sizes
from .fp16_scaling import DTYPES, measured_scales, rescale, to_half
from .gemms import DecoderGemms, EncoderGemms, PackedCrossKVGraph
from .onnx_export import EXTERNAL_DATA_BYTES, OPSET, ExportError, describe_reader, onnx_from_module, require_fitting_tokenizer
from .opset17 import to_opset_17

GpuGraph = EncoderGraph | PackedCrossKVGraph
ONNX_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
HEAD_WIDTHS = (16, 32, 64, 128)  # that the attention kernels are written for: whole tiles, and a power of two of lanes


class Fp16Io(torch.nn.Module):
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
def export_gpu_reader(
    checkpoint: Checkpoint,
    directory: Path,
    precision: str = "float16",
    opset: int = OPSET - 1,
    *,
    whole_encoder: bool = False,
    library: LibraryOptions | None = None,
) -> Manifest:
    """Write the graphs, tokenizer.json, the kernels' arrays and manifest.json; all of them or none.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        precision: "float16", or "bfloat16" for engines that have it (TensorRT 10 and later).
        opset: 17 for TensorRT 8.6; 18 and later as the exporter writes them.
        whole_encoder: the encoder as one graph, for Triton's TensorRT backend, in place of its gemms.
        library: the encoder's GEMMs as library kernels, in place of engines.

    Raises:
        ExportError: if a graph is not as specified, or the reader has sizes that the kernels do not have.
        CheckpointError: if the tokenizer has tokens without an embedding.
        CompileError: if a library kernel does not compile. `directory` is as before in each case.
    """
    require_fitting_tokenizer(checkpoint)
    reader = checkpoint.reader
    _require_kernels(reader.config, whole_encoder=whole_encoder)
    with atomic_directory(directory) as tmp_dir:
        scales, seconds = measured_scales(reader), {}
        encoder = None if whole_encoder else EncoderGemms(reader, scales["encoder"])
        decoder = DecoderGemms(reader, scales["decoder"])
        sizes = engine_sizes(reader.config)

        def write(name: str, graph: GpuGraph, tensors: GraphTensors) -> None:
            started = time.perf_counter()
            export_half(graph, tensors, tmp_dir / f"{name}.onnx", precision, opset)
            seconds[name] = round(time.perf_counter() - started, 2)

        if whole_encoder:
            graph = EncoderGraph(reader)
            rescale(graph, scales["encoder"])
            write("encoder", graph, encoder_tensors(sizes, "float16"))
        write("cross_kv", PackedCrossKVGraph(reader), packed_cross_kv_tensors(sizes))
        k_splits: list[EncoderGemms | DecoderGemms] = [decoder] if encoder is None or library else [encoder, decoder]
        for part in k_splits:
            for gemm, weight in part.gemms():
                tensors = gemm_tensors(part.stack, gemm, precision)
                _, of_weight = tensors.inputs
                np.save(tmp_dir / gemm.weight, _bits(weight, precision).reshape(of_weight.shape({})), allow_pickle=False)
                onnx.save(gemm_model(tensors, opset), tmp_dir / f"{gemm.engine}.onnx")
        (tmp_dir / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        for file, array in (decoder.arrays | (encoder.arrays if encoder else {})).items():
            np.save(tmp_dir / file, array, allow_pickle=False)
        kernels = None
        if library is not None and encoder is not None:
            started = time.perf_counter()
            described = describe_reader(checkpoint, tmp_dir, opset, seconds)
            passages, length = sample_passages(checkpoint, described, library), described.prompt.passage_length
            kernels = write_encoder_library(encoder.graph, encoder.stack, length, tmp_dir, library, passages)
            seconds["encoder_library"] = round(time.perf_counter() - started, 2)
        manifest = describe_reader(checkpoint, tmp_dir, opset, seconds)
        notes = {"scales": {stack: dataclasses.asdict(scale) for stack, scale in scales.items()}}
        manifest = dataclasses.replace(
            manifest,
            engine="onnxruntime-gpu",
            precision=precision,
            encoder=encoder.stack if encoder else None,
            decoder=decoder.stack,
            provenance=manifest.provenance | notes,
            encoder_library=kernels,
        )
        (tmp_dir / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _require_kernels(config: ReaderConfig, *, whole_encoder: bool) -> None:
    faults = []
    stacks = {"decoder": config.decoder} | ({} if whole_encoder else {"encoder": config.encoder})
    for name, stack in stacks.items():
        if stack.d_kv not in HEAD_WIDTHS:
            faults.append(f"d_kv of the {name}: wanted one of {HEAD_WIDTHS}, got {stack.d_kv}")
        for what in ("d_model", "d_ff"):
            if getattr(stack, what) % 8:
                faults.append(f"{what} of the {name}: wanted a multiple of 8, got {getattr(stack, what)}")
    if faults:
        raise ExportError("the GPU's kernels do not have this reader's sizes:\n  " + "\n  ".join(faults))


def export_half(graph: GpuGraph, tensors: GraphTensors, path: Path, precision: str, opset: int) -> None:
    """Cast one graph, export it, and bring it to the older opset where asked for."""
    to_half(graph, DTYPES[precision])
    onnx_from_module(graph if precision == "float16" else Fp16Io(graph, tensors), tensors, path, max(opset, OPSET))
    if opset < OPSET:
        model = onnx.load(str(path))
        to_opset_17(model)
        onnx.save(model, str(path), save_as_external_data=model.ByteSize() > EXTERNAL_DATA_BYTES, location=f"{path.name}.data")


def gemm_model(tensors: GraphTensors, opset: int) -> onnx.ModelProto:
    """X @ weight as a graph, in the weight's type; what crosses the border in another is cast. No module to export: it holds no weights."""
    x, weight = tensors.inputs
    (y,) = tensors.outputs
    inside = ONNX_TYPES[weight.dtype]
    nodes = [helper.make_node("MatMul", [x.name, weight.name], [y.name], name="gemm")]
    if ONNX_TYPES[x.dtype] != inside:
        nodes[0].input[0] = "given"
        nodes.insert(0, helper.make_node("Cast", [x.name], ["given"], name="cast_in", to=inside))
    if ONNX_TYPES[y.dtype] != inside:
        nodes[-1].output[0] = "made"
        nodes.append(helper.make_node("Cast", ["made"], [y.name], name="cast_out", to=ONNX_TYPES[y.dtype]))
    inputs, outputs = ([helper.make_tensor_value_info(s.name, ONNX_TYPES[s.dtype], s.axes) for s in specs] for specs in ((x, weight), (y,)))
    graph = helper.make_graph(nodes, "gemm", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _bits(weight: torch.Tensor, dtype: str) -> np.ndarray:
    """As a file holds it: NumPy has no bfloat16, whose bits travel as integers."""
    made = weight.detach().to(getattr(torch, dtype)).contiguous()
    return (made.view(torch.uint16) if dtype == "bfloat16" else made).numpy()
