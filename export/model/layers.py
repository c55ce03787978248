"""The layers that both stacks are made of, as plain torch modules with no state but their weights.

T5 departs from the textbook in ways that every function here keeps: attention scores are not divided by sqrt(d_kv) (the scale is
folded into the initialisation), positions enter as a bias on the scores that all layers of a stack share, linear layers have no bias,
and the norm only rescales.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint.config import ReaderConfig, StackConfig

# Added to a masked score. Finite, so that a row with every key masked (an empty slot) stays a number.
MASKED = -1e9


class RMSNorm(nn.Module):
    """T5's layer norm: divide by the root mean square, no mean subtracted, no bias; computed in fp32 and cast back."""

    def __init__(self, d_model: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: float[..., d_model] -> the same."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    """ReLU(x wi) wo of T5 v1.0, or (gelu(x wi_0) * x wi_1) wo of v1.1."""

    def __init__(self, stack: StackConfig, proj: str):
        super().__init__()
        self.gated = proj == "gated-gelu"
        if self.gated:
            self.wi_0 = nn.Linear(stack.d_model, stack.d_ff, bias=False)
            self.wi_1 = nn.Linear(stack.d_model, stack.d_ff, bias=False)
        else:
            self.wi = nn.Linear(stack.d_model, stack.d_ff, bias=False)
        self.wo = nn.Linear(stack.d_ff, stack.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: float[..., d_model] -> the same."""
        if self.gated:
            return self.wo(functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(functional.relu(self.wi(x)))


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention over a source that may be wider or narrower than the query side.

    In an asymmetric reader the keys and values of cross-attention map the encoder's width straight to d_kv: no bridge is needed.
    """

    def __init__(self, stack: StackConfig, d_source: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.d_kv = stack.num_heads, stack.num_kv_heads, stack.d_kv
        self.q = nn.Linear(stack.d_model, stack.num_heads * stack.d_kv, bias=False)
        self.k = nn.Linear(d_source, stack.num_kv_heads * stack.d_kv, bias=False)
        self.v = nn.Linear(d_source, stack.num_kv_heads * stack.d_kv, bias=False)
        self.o = nn.Linear(stack.num_heads * stack.d_kv, stack.d_model, bias=False)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from every position of `x` to every position of `source`.

        Args:
            x: float[batch, target_length, d_model].
            source: float[batch, source_length, d_source].
            bias: added to the scores (position bias and mask), broadcastable to float[batch, num_heads, target_length, source_length].

        Returns:
            float[batch, target_length, d_model].
        """
        batch, target_length, _ = x.shape
        query = self.q(x).view(batch, target_length, self.num_heads, self.d_kv).transpose(1, 2)
        key = self.k(source).view(batch, -1, self.num_kv_heads, self.d_kv).transpose(1, 2)
        value = self.v(source).view(batch, -1, self.num_kv_heads, self.d_kv).transpose(1, 2)
        if self.num_kv_heads != self.num_heads:  # query head h reads key/value head h // (num_heads / num_kv_heads)
            key, value = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.o(mixed.transpose(1, 2).reshape(batch, target_length, self.num_heads * self.d_kv))


def relative_position_bucket(distance: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """T5's buckets: exact for short distances, logarithmic up to `max_distance`, one bucket beyond.

    Args:
        distance: int64[...], key position minus query position.
        bidirectional: half of the buckets for keys after the query (encoder); otherwise such keys count as distance 0 (decoder).

    Returns:
        int64[...] in [0, num_buckets).
    """
    bucket = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = torch.where(distance > 0, num_buckets, bucket)
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # clamp before the log: distances below `exact` take the other branch, but log(0) would still be computed
    logarithmic = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    large = (exact + logarithmic.long()).clamp(max=num_buckets - 1)
    return bucket + torch.where(distance < exact, distance, large)


class RelativeBias(nn.Module):
    """One table of biases per head and distance bucket, shared by all layers of a stack."""

    def __init__(self, config: ReaderConfig, num_heads: int, *, bidirectional: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.relative_attention_num_buckets, num_heads))
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """int64[..., target], int64[..., source] -> float[..., num_heads, target, source]."""
        distance = key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1)
        bucket = relative_position_bucket(
            distance, bidirectional=self.bidirectional, num_buckets=self.weight.shape[0], max_distance=self.max_distance
        )
        return functional.embedding(bucket, self.weight).movedim(-1, -3)

    def by_distance(self) -> Tensor:
        """float[max_distance + 1, num_heads]: the bias by how far a key lies behind the query; the last row holds for all beyond.

        Only for the unidirectional tables, where it replaces the bucket arithmetic in the exported step graph.
        """
        behind = torch.arange(self.max_distance + 1, device=self.weight.device)
        bucket = relative_position_bucket(-behind, bidirectional=False, num_buckets=self.weight.shape[0], max_distance=self.max_distance)
        return self.weight[bucket]
