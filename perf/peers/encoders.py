"""T5 v1.1's encoder in PyTorch, as the peers run it: plain, by hand with flex_attention, and by hand in FP8.

Every encoder takes int64[passages, passage_length] token ids, all valid, and gives [passages, passage_length, d_model] after the last norm.
The one from library kernels is in quack_layers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from export.model.reader import EncoderLayer, Reader

Encoder: TypeAlias = Callable[[Tensor], Tensor]
FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # the largest e4m3 number
HEADROOM = 2.0  # by which activations may exceed those that their scale was chosen for


class UnsupportedReaderError(ValueError):
    """A reader that the peers have no code for."""


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer: weights as nn.Linear has them, [out, in]; `wi` the gate's rows and then the linear ones."""

    norm: Tensor
    qkv: Tensor
    o: Tensor
    feed_forward_norm: Tensor
    wi: Tensor
    wo: Tensor


@dataclasses.dataclass(frozen=True)
class EncoderWeights:
    """The encoder of a reader.

    Attributes:
        bias: [num_heads, passage_length, passage_length], what is added to the scores.
    """

    embedding: Tensor
    bias: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    epsilon: float
    num_heads: int

    @property
    def passage_length(self) -> int:
        """Tokens of every passage."""
        return self.bias.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.embedding.dtype

    def to(self, device: str | torch.device, dtype: torch.dtype) -> EncoderWeights:
        """The same on a device, in a precision."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype)

        layers = tuple(
            LayerWeights(**{field.name: moved(getattr(layer, field.name)) for field in dataclasses.fields(LayerWeights)})
            for layer in self.layers
        )
        return dataclasses.replace(
            self, layers=layers, embedding=moved(self.embedding), bias=moved(self.bias), final_norm=moved(self.final_norm)
        )


@torch.no_grad()
def encoder_weights(reader: Reader, passage_length: int) -> EncoderWeights:
    """The weights of a reader's encoder, for passages of one length.

    Raises:
        UnsupportedReaderError: unless the feed-forward is gated, as T5 v1.1's is.
    """
    config = reader.config
    if config.feed_forward_proj != "gated-gelu":
        raise UnsupportedReaderError(f"feed_forward_proj: wanted gated-gelu, got {config.feed_forward_proj}")

    def weights_of(layer: EncoderLayer) -> LayerWeights:
        attention, feed_forward = layer.self_attention, layer.feed_forward
        return LayerWeights(
            layer.self_attention_norm.weight.detach(),
            torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]),
            attention.o.weight.detach(),
            layer.feed_forward_norm.weight.detach(),
            torch.cat([feed_forward.wi_0.weight, feed_forward.wi_1.weight]),
            feed_forward.wo.weight.detach(),
        )

    encoder = reader.encoder
    positions = torch.arange(passage_length, device=reader.embedding.weight.device)
    return EncoderWeights(
        reader.embedding.weight.detach(),
        encoder.relative_bias(positions, positions),
        tuple(weights_of(layer) for layer in encoder.layers),  # type: ignore[arg-type]
        encoder.final_norm.weight.detach(),
        config.layer_norm_epsilon,
        config.encoder.num_heads,
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """T5's norm: fp32 inside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def heads_of(query_key_value: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """[passages, length, 3 * width] -> three of [passages, num_heads, length, d_kv]."""
    passages, length, width = query_key_value.shape
    return query_key_value.view(passages, length, 3, num_heads, width // 3 // num_heads).permute(2, 0, 3, 1, 4).unbind(0)


# What multiplies: an input of layer i, and which product of that layer.
Multiply: TypeAlias = Callable[[Tensor, int, str], Tensor]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def layers_of(weights: EncoderWeights, multiply: Multiply, attend: Attend) -> Encoder:
    """The encoder over two ways: to multiply, and to attend from [passages, num_heads, length, d_kv] queries, keys and values."""

    def encode(ids: Tensor) -> Tensor:
        x = functional.embedding(ids, weights.embedding)
        for i, layer in enumerate(weights.layers):
            normed = rms_norm(x, layer.norm, weights.epsilon)
            mixed = attend(*heads_of(multiply(normed, i, "qkv"), weights.num_heads))
            x = x + multiply(mixed.transpose(1, 2).flatten(2), i, "o")
            normed = rms_norm(x, layer.feed_forward_norm, weights.epsilon)
            gate, linear = multiply(normed, i, "wi").chunk(2, -1)
            x = x + multiply(functional.gelu(gate, approximate="tanh") * linear, i, "wo")
        return rms_norm(x, weights.final_norm, weights.epsilon)

    return encode


def by_linear(weights: EncoderWeights) -> Multiply:
    """Products in the weights' own precision."""
    return lambda x, i, product: functional.linear(x, getattr(weights.layers[i], product))


def plain(weights: EncoderWeights) -> Encoder:
    """The plainest form: the reference in fp32, and what the faster ones are tested against."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.transpose(-1, -2) + weights.bias, -1) @ value

    return layers_of(weights, by_linear(weights), attend)


def flex(weights: EncoderWeights) -> Attend:
    """Attention by flex_attention, with the bias looked up in fp32; fast only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    bias = weights.bias.float()

    def add_bias(score: Tensor, passage: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_attention(query, key, value, score_mod=add_bias, scale=1.0)

    return attend


def compiled(encoder: Encoder) -> Encoder:
    """As an expert would compile it; the first call takes a minute and more."""
    torch._dynamo.reset()
    return torch.compile(encoder, mode="max-autotune-no-cudagraphs", dynamic=False)


def by_hand(weights: EncoderWeights) -> Encoder:
    """flex_attention and torch.compile."""
    return compiled(layers_of(weights, by_linear(weights), flex(weights)))


@dataclasses.dataclass(frozen=True)
class Quantized:
    """An e4m3 tensor and what it must be multiplied by."""

    values: Tensor
    scale: float


def quantize(tensor: Tensor) -> Quantized:
    """With one scale, so that the largest number of it becomes e4m3's largest."""
    scale = float(tensor.abs().max().float()) / FP8_MOST or 1.0
    return Quantized((tensor.float() / scale).to(FP8), scale)


@torch.no_grad()
def activation_scales(weights: EncoderWeights, ids: Tensor) -> list[dict[str, float]]:
    """Static scales of what goes into every product of every layer, from some passages in the weights' precision."""
    scales: list[dict[str, float]] = [{} for _ in weights.layers]
    multiply = by_linear(weights)

    def recording(x: Tensor, i: int, product: str) -> Tensor:
        scales[i][product] = float(x.abs().max()) * HEADROOM / FP8_MOST
        return multiply(x, i, product)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=weights.bias[None], scale=1.0)

    layers_of(weights, recording, attend)(ids)
    return scales


def by_scaled_mm(weights: EncoderWeights, scales: list[dict[str, float]]) -> Multiply:
    """Products in FP8 with fast accumulation, by torch._scaled_mm; the casts are left to the compiler."""
    device = weights.embedding.device
    quantized = [{name: quantize(getattr(layer, name)) for name in ("qkv", "o", "wi", "wo")} for layer in weights.layers]
    of_weights = [{name: torch.tensor(one.scale, device=device) for name, one in layer.items()} for layer in quantized]
    of_inputs = [{name: torch.tensor(scale, device=device) for name, scale in layer.items()} for layer in scales]

    def multiply(x: Tensor, i: int, product: str) -> Tensor:
        scaled = (x * (1 / scales[i][product])).clamp(-FP8_MOST, FP8_MOST).to(FP8)
        made = torch._scaled_mm(
            scaled.flatten(0, -2),
            quantized[i][product].values.t(),
            scale_a=of_inputs[i][product],
            scale_b=of_weights[i][product],
            out_dtype=weights.dtype,
            use_fast_accum=True,
        )
        return made.view(*x.shape[:-1], -1)

    return multiply


def by_hand_fp8(weights: EncoderWeights, scales: list[dict[str, float]]) -> Encoder:
    """flex_attention, torch._scaled_mm and torch.compile."""
    # of the compiler's own templates none is as fast as cuBLAS here, and trying them takes minutes
    torch._inductor.config.max_autotune_gemm_backends = "ATEN"
    return compiled(layers_of(weights, by_scaled_mm(weights, scales), flex(weights)))
