"""A GPU reader split as serving/contract/gemms.py describes: the weights of its GEMMs, and the arrays that the kernels read.

Comes in: a Reader and its scales. Goes out: tensors and arrays by the names of their files. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from export.checkpoint.config import FeedForward, StackConfig
from export.manifest_writer import engine_sizes
from export.model.layers import Attention
from export.model.reader import Reader
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

from .cpu import DecoderStepGraph, DecoderStepLayer, EncoderGraph, EncoderGraphLayer, GraphNorm, Projection
from .fp16_scaling import Scales, rescale


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


def stack_sizes(stack: StackConfig, proj: FeedForward, epsilon: float) -> StackSizes:
    """Sizes that the GEMMs and kernels of a stack depend on."""
    gated = proj == "gated-gelu"
    return StackSizes(stack.d_model, stack.num_layers, stack.num_heads, stack.num_kv_heads, stack.d_kv, stack.d_ff, gated, epsilon)


def _half(weights: Tensor) -> np.ndarray:
    return weights.detach().to(torch.float16).numpy()


def _weights(norms: list[GraphNorm]) -> np.ndarray:
    return torch.stack([norm.weight for norm in norms]).float().numpy()
