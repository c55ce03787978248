"""A reader for the GPU -> ONNX: its GEMMs and cross_kv in half precision, and the arrays of the kernels between them.

Comes in: a checkpoint. Goes out: an engine directory. TensorRT compiles these graphs (export/tensorrt/compiler.py); ONNX Runtime's CUDA
provider runs them as they are. The precision is in the types of the graphs, so that a strongly typed compiler needs no flag.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper

from export.checkpoint.config import ReaderConfig
from export.checkpoint.files import Checkpoint
from export.errors import ExportError
from export.library.encoder import cross_kv_scales, sample_passages, write_encoder_library
from export.library.options import LibraryOptions
from export.manifest_writer import atomic_directory, describe_reader, engine_sizes, write_manifest
from serving.contract.gemms import CROSS_KV_SCALES, array_file, gemm_tensors, packed_cross_kv_tensors
from serving.contract.manifest import FLOAT8, TOKENIZER_FILE, Manifest
from serving.contract.tensors import GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors

from .cpu import CrossKVGraph, DecoderStepGraph, EncoderGraph
from .gemms import DTYPES, DecoderGemms, EncoderGemms, PackedCrossKVGraph, measured_scales, rescale, to_half
from .onnx_export import EXTERNAL_DATA_BYTES, OPSET, TENSORRT_OPSET, onnx_from_module, require_fitting_tokenizer, stages, to_opset_17

GpuGraph = EncoderGraph | PackedCrossKVGraph | CrossKVGraph | DecoderStepGraph
ONNX_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
HEAD_WIDTHS = (16, 32, 64, 128)  # of the attention kernels, which want whole tiles and a power of two of lanes


class Fp16Io(torch.nn.Module):
    """A graph whose half-precision inputs and outputs are float16, whatever type it computes in."""

    def __init__(self, graph: GpuGraph, tensors: GraphTensors, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = graph, dtype
        self.is_half = [spec.dtype == "float16" for spec in tensors.outputs]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of the graph's own forward."""
        outputs = self.inner(*(x.to(self.dtype) if x.dtype == torch.float16 else x for x in tensors))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(y.to(torch.float16) if half else y for y, half in zip(outputs, self.is_half, strict=True))


@torch.no_grad()
def export_gpu_reader(
    checkpoint: Checkpoint,
    directory: Path,
    precision: str = "float16",
    opset: int = TENSORRT_OPSET,
    *,
    whole_encoder: bool = False,
    whole: bool = False,
    library: LibraryOptions | None = None,
) -> Manifest:
    """Write the graphs, tokenizer.json, the kernels' arrays and manifest.json: all of them or none.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        precision: "float16", or "bfloat16" for engines that support it (TensorRT 10 and later).
        opset: 17 for TensorRT 8.6; 18 and later as torch's exporter writes them.
        whole_encoder: the encoder as one graph, for Triton's TensorRT backend, instead of its GEMMs.
        whole: encoder, cross_kv and decoder_step as one graph each: no kernel of ours runs between or within them.
        library: the encoder's GEMMs as library kernels instead of engines (not of a whole encoder), and what is in FP8; resolved.

    Raises:
        ExportError: if a graph differs from its specification, or the kernels do not support the reader's sizes.
        CompileError: if a library kernel does not compile.
        CheckpointError: if the tokenizer has tokens without an embedding. In each case `directory` stays as it was.
    """
    require_fitting_tokenizer(checkpoint)
    reader = checkpoint.reader
    if whole:
        if library is not None and library.cross_kv == FLOAT8:
            raise ExportError("keys and values of cross-attention in float8: whole graphs have none; export with GRAPHS=gemms")
        return _export_whole(checkpoint, directory, precision, opset)
    _require_kernels(reader.config, whole_encoder=whole_encoder)
    library = library or LibraryOptions()
    narrow_encoder = library.compiles and library.precision == FLOAT8 and not whole_encoder
    cross_kv_precision = _cross_kv_precision(reader.config, library.cross_kv, narrow_encoder=narrow_encoder)
    with atomic_directory(directory) as tmp_dir:
        stage = stages(reader)
        stage("scales of half precision")
        scales, seconds = measured_scales(reader), {}
        encoder = None if whole_encoder else EncoderGemms(reader, scales["encoder"])
        decoder = DecoderGemms(reader, scales["decoder"])
        sizes = engine_sizes(reader.config)

        def write(name: str, graph: GpuGraph, tensors: GraphTensors) -> None:
            stage(f"{name}.onnx")
            started = time.perf_counter()
            export_half(graph, tensors, tmp_dir / f"{name}.onnx", precision, opset)
            seconds[name] = round(time.perf_counter() - started, 2)

        if whole_encoder:
            graph = EncoderGraph(reader)
            rescale(graph, scales["encoder"])
            write("encoder", graph, encoder_tensors(sizes, "float16"))
        write("cross_kv", PackedCrossKVGraph(reader), packed_cross_kv_tensors(sizes))
        stacks: list[EncoderGemms | DecoderGemms] = [decoder] if encoder is None else [encoder, decoder]
        kernels = None
        passages = sample_passages(checkpoint, library.samples) if narrow_encoder or cross_kv_precision == FLOAT8 else []
        if library.compiles and encoder is not None:
            stage("library kernels of the encoder")
            started = time.perf_counter()
            kernels = write_encoder_library(encoder.graph, encoder.stack, reader.config.passage_length, tmp_dir, library, passages)
            seconds["encoder_library"] = round(time.perf_counter() - started, 2)
        if cross_kv_precision == FLOAT8:
            stage("scales of keys and values")
            graph = EncoderGraph(reader) if encoder is None else encoder.graph
            found = cross_kv_scales(graph, PackedCrossKVGraph(reader), sizes.num_kv_heads, passages)
            np.save(tmp_dir / array_file("decoder", CROSS_KV_SCALES), found, allow_pickle=False)
        stage("weights and GEMMs")
        for stack in stacks:
            for gemm, weight in () if kernels and stack is encoder else stack.gemms():
                tensors = gemm_tensors(stack.stack, gemm, precision)
                _, weight_spec = tensors.inputs
                np.save(tmp_dir / gemm.weight, _stored(weight, precision).reshape(weight_spec.shape({})), allow_pickle=False)
                onnx.save(gemm_model(tensors, opset), tmp_dir / f"{gemm.engine}.onnx")
            for file, array in stack.arrays.items():
                np.save(tmp_dir / file, array, allow_pickle=False)
        (tmp_dir / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        manifest = describe_reader(
            checkpoint,
            tmp_dir,
            opset,
            seconds,
            engine="onnxruntime-gpu",
            precision=precision,
            encoder=encoder.stack if encoder else None,
            decoder=decoder.stack,
            encoder_library=kernels,
            cross_kv_precision=cross_kv_precision,
            notes={"scales": {name: dataclasses.asdict(scale) for name, scale in scales.items()}},
        )
        return write_manifest(manifest, tmp_dir)


def _export_whole(checkpoint: Checkpoint, directory: Path, precision: str, opset: int) -> Manifest:
    """`export_gpu_reader` with whole graphs."""
    reader, sizes, seconds = checkpoint.reader, engine_sizes(checkpoint.reader.config), {}
    with atomic_directory(directory) as tmp_dir:
        stage = stages(reader)
        stage("scales of half precision")
        scales = measured_scales(reader)
        encoder, decoder = EncoderGraph(reader), DecoderStepGraph(reader)
        rescale(encoder, scales["encoder"])
        rescale(decoder, scales["decoder"])
        graphs: dict[str, tuple[GpuGraph, GraphTensors]] = {
            "encoder": (encoder, encoder_tensors(sizes, "float16")),
            "cross_kv": (CrossKVGraph(reader), cross_kv_tensors(sizes, "float16")),
            "decoder_step": (decoder, decoder_step_tensors(sizes, "float16")),
        }
        for name, (graph, tensors) in graphs.items():
            stage(f"{name}.onnx")
            started = time.perf_counter()
            export_half(graph, tensors, tmp_dir / f"{name}.onnx", precision, opset)
            seconds[name] = round(time.perf_counter() - started, 2)
        (tmp_dir / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        notes = {"scales": {name: dataclasses.asdict(scale) for name, scale in scales.items()}}
        manifest = describe_reader(checkpoint, tmp_dir, opset, seconds, engine="onnxruntime-gpu", precision=precision, notes=notes)
        return write_manifest(manifest, tmp_dir)


def _require_kernels(config: ReaderConfig, *, whole_encoder: bool) -> None:
    faults = []
    stacks = {"decoder": config.decoder} | ({} if whole_encoder else {"encoder": config.encoder})
    for name, stack in stacks.items():
        if stack.d_kv not in HEAD_WIDTHS:
            faults.append(f"d_kv of the {name}: wanted one of {HEAD_WIDTHS}, got {stack.d_kv}")
        for size in ("d_model", "d_ff"):
            if getattr(stack, size) % 8:
                faults.append(f"{size} of the {name}: wanted a multiple of 8, got {getattr(stack, size)}")
    if faults:
        raise ExportError("the GPU kernels do not support this reader's sizes; export it with GRAPHS=whole:\n  " + "\n  ".join(faults))


def _cross_kv_precision(config: ReaderConfig, wanted: str | None, *, narrow_encoder: bool) -> str:
    """Of cross-attention's keys and values. Shared keys are few bytes: they stay in half precision."""
    heads, kv_heads = config.decoder.num_heads, config.decoder.num_kv_heads
    if wanted == FLOAT8 and kv_heads != heads:
        raise ExportError(
            f"keys and values of cross-attention in float8: wanted a key/value head for each of {heads} heads, got {kv_heads}; "
            "export this reader with --cross-kv-precision float16"
        )
    return wanted or (FLOAT8 if narrow_encoder and kv_heads == heads else "float16")


def export_half(graph: GpuGraph, tensors: GraphTensors, path: Path, precision: str, opset: int) -> None:
    """Cast one graph to `precision` and export it; opset 17 is reached by rewriting 18."""
    to_half(graph, DTYPES[precision])
    onnx_from_module(graph if precision == "float16" else Fp16Io(graph, tensors, DTYPES[precision]), tensors, path, max(opset, OPSET))
    if opset < OPSET:
        model = onnx.load(str(path))
        to_opset_17(model)
        onnx.save(model, str(path), save_as_external_data=model.ByteSize() > EXTERNAL_DATA_BYTES, location=f"{path.name}.data")


def gemm_model(tensors: GraphTensors, opset: int) -> onnx.ModelProto:
    """Y = X @ weight as a graph, in the weight's type, with casts where X or Y has another. It holds no weights: they are an input."""
    x, weight = tensors.inputs
    (y,) = tensors.outputs
    inner_type = ONNX_TYPES[weight.dtype]
    nodes = [helper.make_node("MatMul", [x.name, weight.name], [y.name], name="gemm")]
    if ONNX_TYPES[x.dtype] != inner_type:
        nodes[0].input[0] = "x_cast"
        nodes.insert(0, helper.make_node("Cast", [x.name], ["x_cast"], name="cast_in", to=inner_type))
    if ONNX_TYPES[y.dtype] != inner_type:
        nodes[-1].output[0] = "y_uncast"
        nodes.append(helper.make_node("Cast", ["y_uncast"], [y.name], name="cast_out", to=ONNX_TYPES[y.dtype]))
    inputs, outputs = ([helper.make_tensor_value_info(s.name, ONNX_TYPES[s.dtype], s.axes) for s in specs] for specs in ((x, weight), (y,)))
    graph = helper.make_graph(nodes, "gemm", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _stored(weight: torch.Tensor, dtype: str) -> np.ndarray:
    """The array that the file holds. NumPy has no bfloat16, so its bits are stored as uint16."""
    cast = weight.detach().to(getattr(torch, dtype)).contiguous()
    return (cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy()
