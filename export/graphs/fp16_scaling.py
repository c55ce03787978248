"""Half precision without overflow: weights rescaled by powers of two so that every activation fits, then cast.

T5's residual stream exceeds the largest fp16 number (65,504). Every layer that reads it divides by its root mean square first. A common
factor on all writers (embedding, attention outputs, feed-forward outputs) therefore changes nothing, once epsilon is multiplied by the
square of the factor. A power of two changes no mantissa. The inner activations of the feed-forward layer get a factor of their own, which
the output weights divide out again. Norms stay fp32 (cpu.py). Casts and rescales modules in place; writes no files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from export.model.layers import Attention, FeedForward
from export.model.reader import DecoderLayer, EncoderLayer, Reader

from .cpu import BiasTable, DecoderStepGraph, EncoderGraph, FusedFeedForward, GraphNorm, Projection

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
