"""A reader for the GPU -> ONNX: its products and cross_kv in half precision, and the arrays of the kernels between them.

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
from onnx import helper

from serving.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from serving.products import packed_cross_kv_tensors, product_tensors
from serving.tensors import GraphTensors, encoder_tensors

from .checkpoint import Checkpoint
from .config import ReaderConfig
from .graphs import EncoderGraph, Projection, engine_sizes
from .half import DTYPES, Scales, measured_scales, rescale, to_half
from .model import Reader
from .onnx_graph import EXTERNAL_DATA_BYTES, OPSET, ExportError, describe_reader, onnx_from_module, require_fitting_tokenizer
from .onnx_passes import to_opset_17
from .products import DecoderProducts, EncoderProducts, PackedCrossKVGraph
from .staging import replacing

GpuGraph = EncoderGraph | Projection | PackedCrossKVGraph
ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
HEAD_WIDTHS = (16, 32, 64, 128)  # that the attention kernels are written for: whole tiles, and a power of two of lanes


def gpu_graphs(
    reader: Reader, encoder: EncoderProducts | None, decoder: DecoderProducts, whole: Scales
) -> Iterator[tuple[str, GpuGraph, GraphTensors]]:
    """Name, module and tensors of each graph; without the encoder's products a whole encoder, rescaled by `whole`."""
    sizes = engine_sizes(reader.config)
    if encoder is None:
        graph = EncoderGraph(reader)
        rescale(graph, whole)
        yield "encoder", graph, encoder_tensors(sizes, "float16")
    else:
        for product, projection in encoder.products():
            yield product.name, projection, product_tensors(encoder.stack, product)
    yield "cross_kv", PackedCrossKVGraph(reader), packed_cross_kv_tensors(sizes)
    for product, projection in decoder.products():
        yield product.name, projection, product_tensors(decoder.stack, product, sizes.vocab_size)


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
def export_gpu_reader(
    checkpoint: Checkpoint, directory: Path, precision: str = "float16", opset: int = OPSET - 1, *, whole_encoder: bool = False
) -> Manifest:
    """Write the graphs, tokenizer.json, the kernels' arrays and manifest.json; all of them or none.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        precision: "float16", or "bfloat16" for engines that have it (TensorRT 10 and later).
        opset: 17 for TensorRT 8.6; 18 and later as the exporter writes them.
        whole_encoder: the encoder as one graph, for Triton's TensorRT backend, in place of its products.

    Raises:
        ExportError: if a graph is not as specified, or the reader has sizes that the kernels do not have.
        CheckpointError: if the tokenizer has tokens without an embedding. `directory` is as before in either case.
    """
    require_fitting_tokenizer(checkpoint)
    reader = checkpoint.reader
    _require_kernels(reader.config, whole_encoder=whole_encoder)
    with replacing(directory) as beside:
        scales, seconds = measured_scales(reader), {}
        encoder = None if whole_encoder else EncoderProducts(reader, scales["encoder"])
        decoder = DecoderProducts(reader, scales["decoder"])
        for name, graph, tensors in gpu_graphs(reader, encoder, decoder, scales["encoder"]):
            started = time.perf_counter()
            export_half(graph, tensors, beside / f"{name}.onnx", precision, opset)
            seconds[name] = round(time.perf_counter() - started, 2)
        (beside / TOKENIZER_FILE).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        for file, array in (decoder.arrays | (encoder.arrays if encoder else {})).items():
            np.save(beside / file, array, allow_pickle=False)
        manifest = describe_reader(checkpoint, beside, opset, seconds)
        notes = {"scales": {stack: dataclasses.asdict(scale) for stack, scale in scales.items()}}
        manifest = dataclasses.replace(
            manifest,
            engine="onnxruntime-gpu",
            precision=precision,
            encoder=encoder.stack if encoder else None,
            decoder=decoder.stack,
            provenance=manifest.provenance | notes,
        )
        (beside / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
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
    """Cast one graph, export it, and bring it to the older opset where asked for. What makes fp32 (the logits) stays fp32."""
    if all(spec.dtype == "float16" for spec in tensors.outputs):
        to_half(graph, DTYPES[precision])
    if isinstance(graph, Projection):
        model = product_model(graph.weight, tensors, opset)
    else:
        module = graph if precision == "float16" else HalfBorders(graph, tensors)
        onnx_from_module(module, tensors, path, max(opset, OPSET))
        if opset >= OPSET:
            return
        model = onnx.load(str(path))
        to_opset_17(model)
    onnx.save(model, str(path), save_as_external_data=model.ByteSize() > EXTERNAL_DATA_BYTES, location=f"{path.name}.data")


def product_model(weight: torch.Tensor, tensors: GraphTensors, opset: int) -> onnx.ModelProto:
    """One product as a graph of its own. Written by hand: torch's exporter takes a second for each, and a reader has a hundred.

    Args:
        weight: float[in, out], in the type to multiply in; what crosses the border is cast where it has another.
        tensors: of the product.
        opset: of the graph.
    """
    (given,), (made,) = tensors.inputs, tensors.outputs
    inside = ONNX_TYPES[str(weight.dtype).removeprefix("torch.")]
    # NumPy has no bfloat16: the bits travel as integers
    bits = weight.contiguous().view(torch.int16) if weight.dtype == torch.bfloat16 else weight.contiguous()
    constant = onnx.TensorProto(name="weight", data_type=inside, dims=weight.shape, raw_data=bits.numpy().tobytes())
    names, nodes = {"given": given.name, "made": made.name}, []
    if ONNX_TYPES[given.dtype] != inside:
        names["given"] = "given"
        nodes.append(helper.make_node("Cast", [given.name], ["given"], name="cast_in", to=inside))
    if ONNX_TYPES[made.dtype] != inside:
        names["made"] = "made"
    nodes.append(helper.make_node("MatMul", [names["given"], "weight"], [names["made"]], name="product"))
    if names["made"] == "made":
        nodes.append(helper.make_node("Cast", ["made"], [made.name], name="cast_out", to=ONNX_TYPES[made.dtype]))
    ends = [[helper.make_tensor_value_info(s.name, ONNX_TYPES[s.dtype], s.axes)] for s in (given, made)]
    graph = helper.make_graph(nodes, "product", *ends, initializer=[constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
