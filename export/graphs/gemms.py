"""A GPU reader split as serving/contract/gemms.py describes: the weights of its GEMMs, and the arrays that the kernels read.

Comes in: a Reader and its scales. Goes out: tensors and arrays by the names of their files. Writes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from export.checkpoint.config import FeedForward as FeedForwardKind
from export.checkpoint.config import StackConfig
from export.manifest_writer import engine_sizes
from export.model.reader import Attention, DecoderLayer, EncoderLayer, FeedForward, Reader
from serving.contract.gemms import (
    BIAS,
    CROSS_BIAS,
    EMBEDDING,
    HEAD,
    NORMS,
    Gemm,
    StackSizes,
    array_file,
    decoder_gemms,
    encoder_gemms,
)

from .cpu import BiasTable, DecoderStepGraph, DecoderStepLayer, EncoderGraph, EncoderGraphLayer, FusedFeedForward, GraphNorm, Projection

# Half precision without overflow: weights rescaled by powers of two so that every activation fits, then cast.
#
# T5's residual stream exceeds the largest fp16 number (65,504). Every layer that reads it divides by its root mean square first. A common
# factor on all writers (embedding, attention outputs, feed-forward outputs) therefore changes nothing, once epsilon is multiplied by the
# square of the factor. A power of two changes no mantissa. The inner activations of the feed-forward layer get a factor of their own, which
# the output weights divide out again. Norms stay fp32 (cpu.py). Casts and rescales modules in place; writes no files.

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST = 65504.0  # fp16 number
# Activations of the sample tokens must stay below the largest number by this factor, because other inputs may exceed them.
HEADROOM = 32.0
SAMPLE_PASSAGES, SAMPLE_LENGTH, SAMPLE_TARGETS = 8, 64, 16


@dataclasses.dataclass(frozen=True)
class Scales:
    """Factors of one stack, powers of two and at most 1.

    Attributes:
        residual: of the residual stream.
        inner: of the inner activations of the feed-forward layers.
    """

    residual: float
    inner: float


@torch.no_grad()
def measured_scales(reader: Reader, seed: int = 0) -> dict[str, Scales]:
    """Scales of "encoder" and "decoder" that leave HEADROOM over the activations of random tokens in fp32."""
    largest = {"encoder": [0.0, 0.0], "decoder": [0.0, 0.0]}
    hooks = []

    def watch(stack: str, place: int, *, inputs: bool) -> object:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            largest[stack][place] = max(largest[stack][place], float((arguments[0] if inputs else output).abs().max()))

        return hook

    for stack, module in (("encoder", reader.encoder), ("decoder", reader.decoder)):
        for child in module.modules():
            if isinstance(child, EncoderLayer | DecoderLayer):
                hooks += [child.register_forward_hook(watch(stack, 0, inputs=i)) for i in (True, False)]  # type: ignore[arg-type]
            elif isinstance(child, FeedForward):
                hooks.append(child.wo.register_forward_hook(watch(stack, 1, inputs=True)))  # type: ignore[arg-type]
                hooks.append(child.wo.register_forward_hook(watch(stack, 0, inputs=False)))  # type: ignore[arg-type]
            elif isinstance(child, Attention):
                hooks.append(child.o.register_forward_hook(watch(stack, 0, inputs=False)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    vocabulary = reader.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, SAMPLE_PASSAGES, SAMPLE_LENGTH), generator=generator)
    targets = torch.randint(0, vocabulary, (1, SAMPLE_TARGETS), generator=generator)
    try:
        reader(ids, torch.ones_like(ids), targets)
    finally:
        for hook in hooks:
            hook.remove()
    return {stack: Scales(*(_power_of_two(value) for value in values)) for stack, values in largest.items()}


def _power_of_two(largest: float) -> float:
    """The largest power of two, at most 1, that brings `largest` to LARGEST / HEADROOM or below."""
    return 1.0 if largest * HEADROOM <= LARGEST else 2.0 ** math.floor(math.log2(LARGEST / HEADROOM / largest))


def to_half(graph: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a graph; norms stay fp32."""
    for module in graph.modules():
        if isinstance(module, Projection):
            module.weight = module.weight.to(dtype)
        elif isinstance(module, BiasTable):
            module.table = module.table.to(dtype)
    embedding = getattr(graph, "embedding", None)
    if embedding is not None:
        graph.embedding = embedding.to(dtype)


def _writers(graph: EncoderGraph | DecoderStepGraph) -> Iterator[Projection]:
    for name, module in graph.named_modules():
        if isinstance(module, Projection) and name.rsplit(".", 1)[-1] in ("o", "cross_o", "wo"):
            yield module


def rescale(graph: EncoderGraph | DecoderStepGraph, scales: Scales) -> None:
    """Scale a graph's activations into the range of half precision, by scaling the weights that write them."""
    graph.embedding = graph.embedding * scales.residual
    for projection in _writers(graph):
        projection.weight = projection.weight * scales.residual
    for module in graph.modules():
        if isinstance(module, GraphNorm):
            module.epsilon = module.epsilon * scales.residual**2
        elif isinstance(module, FusedFeedForward):
            # A positive factor passes through relu. It does not pass through gelu, so the gated form scales only its other branch.
            first = module.wi.weight.shape[1] // 2 if module.gated else 0
            factor = torch.ones(module.wi.weight.shape[1])
            factor[first:] = scales.inner
            module.wi.weight = module.wi.weight * factor
            module.wo.weight = module.wo.weight / scales.inner


class EncoderGemms:
    """The encoder of a reader, with its weights rescaled for half precision.

    Attributes:
        graph: the encoder, rescaled.
        stack: its sizes, for the manifest.
        arrays: file name -> array: the embedding float16[vocab_size, d_model]; the norms float32[norms, d_model] in order of use; the
            position bias float32[2 * max_distance + 1, num_heads] by key position minus query position.
    """

    def __init__(self, reader: Reader, scales: Scales):
        graph = self.graph = EncoderGraph(reader)
        rescale(graph, scales)
        self._layers: list[EncoderGraphLayer] = list(graph.layers)  # type: ignore[arg-type]
        norms = [norm for layer in self._layers for norm in (layer.self_attention_norm, layer.feed_forward_norm)]
        self.stack = stack_sizes(reader.config.encoder, reader.config.feed_forward_proj, graph.final_norm.epsilon)
        self.arrays = {
            array_file("encoder", EMBEDDING): _half(graph.embedding),
            array_file("encoder", NORMS): _weights([*norms, graph.final_norm]),
            array_file("encoder", BIAS): graph.bias.table.float().numpy(),
        }

    def gemms(self) -> Iterator[tuple[Gemm, Tensor]]:
        """Each GEMM with its weights, float32[in_features, out_features]."""
        for gemm in encoder_gemms(self.stack):
            layer = self._layers[gemm.layer]
            found = {"qkv": layer.qkv, "o": layer.o, "wi": layer.feed_forward.wi, "wo": layer.feed_forward.wo}
            yield gemm, found[gemm.kind].weight


class DecoderGemms:
    """The decoder of a reader, with its weights rescaled for half precision.

    Attributes:
        stack: its sizes, for the manifest.
        arrays: file name -> array: embedding and norms as in `EncoderGemms`; the position biases float32[max_distance + 1, num_heads] by
            distance of the key behind the query; the head float16[vocab_size, d_model].
    """

    def __init__(self, reader: Reader, scales: Scales):
        graph = DecoderStepGraph(reader)
        rescale(graph, scales)
        config = reader.config
        self._layers: list[DecoderStepLayer] = list(graph.layers)  # type: ignore[arg-type]
        self._sizes = engine_sizes(config)
        self.stack = stack_sizes(config.decoder, config.feed_forward_proj, graph.final_norm.epsilon)
        norms = []
        for layer in self._layers:
            across = [layer.cross_attention_norm] if layer.cross_attends else []
            norms += [layer.self_attention_norm, *across, layer.feed_forward_norm]
        weights = _weights([*norms, graph.final_norm])
        weights[-1] *= graph.output_scale or 1.0
        biases = {BIAS: reader.decoder.relative_bias, CROSS_BIAS: reader.decoder.cross_relative_bias}
        self.arrays = {
            array_file("decoder", EMBEDDING): _half(graph.embedding),
            array_file("decoder", NORMS): weights,
            array_file("decoder", HEAD): _half(graph.head.weight.T).copy(),
            **{
                array_file("decoder", name): bias.by_distance().detach().float().numpy()
                for name, bias in biases.items()
                if bias is not None
            },
        }

    def gemms(self) -> Iterator[tuple[Gemm, Tensor]]:
        """Each GEMM with its weights, float32[in_features, out_features]."""
        for gemm in decoder_gemms(self._sizes):
            layer = self._layers[gemm.layer]
            found = {"qkv": layer.qkv, "o": layer.o, "wi": layer.feed_forward.wi, "wo": layer.feed_forward.wo}
            if layer.cross_attends:
                found |= {"cross_q": layer.cross_q, "cross_o": layer.cross_o}
            yield gemm, found[gemm.kind].weight


class PackedCrossKVGraph(nn.Module):
    """`packed_cross_kv_tensors`: packed hidden states of a question -> keys and values of each cross-attending layer, token by token."""

    def __init__(self, reader: Reader):
        super().__init__()
        attentions: list[Attention] = [reader.decoder.layers[i].cross_attention for i in reader.config.cross_attention_layers]  # type: ignore[misc]
        self.projections = nn.ModuleList(Projection(a.k, a.v) for a in attentions)

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """float[encoder_sequence_length, d_model] -> float[encoder_sequence_length, 2 * num_kv_heads * d_kv] per layer."""
        return tuple(projection(encoder_hidden_states) for projection in self.projections)


def stack_sizes(stack: StackConfig, proj: FeedForwardKind, epsilon: float) -> StackSizes:
    """Sizes that the GEMMs and kernels of a stack depend on."""
    gated = proj == "gated-gelu"
    return StackSizes(stack.d_model, stack.num_layers, stack.num_heads, stack.num_kv_heads, stack.d_kv, stack.d_ff, gated, epsilon)


def _half(weights: Tensor) -> np.ndarray:
    return weights.detach().to(torch.float16).numpy()


def _weights(norms: list[GraphNorm]) -> np.ndarray:
    return torch.stack([norm.weight for norm in norms]).float().numpy()
