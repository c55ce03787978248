"""A decoder step in PyTorch as its users run it fast: static caches, compiled, and captured into a CUDA graph.

Greedy answers of a batch of questions, all of one length: the end token is never chosen, so that every run does the same work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from export.model.reader import Attention, DecoderLayer, Reader

from .encoders import UnsupportedReaderError, rms_norm

# Attention of a few queries [batch, num_kv_heads, group, d_kv] to long keys and values [batch, num_kv_heads, tokens, d_kv].
CrossAttend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two products with a softmax between: the compiler turns those of single rows into reductions at the speed of the memory."""
    return torch.softmax(query @ key.transpose(-1, -2), -1, dtype=torch.float32).to(value.dtype) @ value


def by_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own choice of a fused kernel."""
    return functional.scaled_dot_product_attention(query, key, value, scale=1.0)


def by_flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """flex_attention, which splits the keys of short queries over the card; fast only when compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, scale=1.0)


CROSS_ATTENTION: dict[str, CrossAttend] = {"products": by_products, "sdpa": by_sdpa, "flex": by_flex}


@dataclasses.dataclass(frozen=True)
class StepLayer:
    """Weights of one layer, [out, in] each; those of cross-attention are None where the layer has none."""

    norm: Tensor
    qkv: Tensor
    o: Tensor
    cross_norm: Tensor | None
    cross_q: Tensor | None
    cross_o: Tensor | None
    feed_forward_norm: Tensor
    wi: Tensor
    wo: Tensor

    @classmethod
    def of(cls, layer: DecoderLayer) -> StepLayer:
        """The weights, those that read the same input as one."""
        own, cross, feed_forward = layer.self_attention, layer.cross_attention, layer.feed_forward
        return cls(
            layer.self_attention_norm.weight,
            torch.cat([own.q.weight, own.k.weight, own.v.weight]),
            own.o.weight,
            None if layer.cross_attention_norm is None else layer.cross_attention_norm.weight,
            None if cross is None else cross.q.weight,
            None if cross is None else cross.o.weight,
            layer.feed_forward_norm.weight,
            torch.cat([feed_forward.wi_0.weight, feed_forward.wi_1.weight]),
            feed_forward.wo.weight,
        )


class StaticDecoder:
    """Answers a batch over buffers that stay where they are.

    Args:
        reader: FiD or FiDO, on the device and in the precision that it is to run in.
        batch: questions.
        encoder_tokens: of every question.
        new_tokens: of every answer.
        cross: of CROSS_ATTENTION.

    Raises:
        UnsupportedReaderError: for a reader without a gated feed-forward, or with a bias on cross-attention.
    """

    @torch.no_grad()
    def __init__(self, reader: Reader, batch: int, encoder_tokens: int, new_tokens: int, cross: str = "products"):
        config = self.config = reader.config
        if config.feed_forward_proj != "gated-gelu" or config.cross_attention_relative_bias:
            raise UnsupportedReaderError("wanted T5 v1.1's decoder: a gated feed-forward, and no bias on cross-attention")
        stack, weight = config.decoder, reader.target_embedding().weight
        self._reader, self._embedding, self._cross_attend = reader, weight, CROSS_ATTENTION[cross]
        self._layers = [StepLayer.of(layer) for layer in reader.decoder.layers]  # type: ignore[arg-type]
        sources: list[Attention] = [reader.decoder.layers[i].cross_attention for i in config.cross_attention_layers]  # type: ignore[misc]
        self._cross_kv = [torch.cat([source.k.weight, source.v.weight]) for source in sources]
        self._final_norm = reader.decoder.final_norm.weight
        # of heads side by side, by how far the key lies behind the query
        self._bias = reader.decoder.relative_bias.by_distance().detach().view(-1, stack.num_kv_heads, stack.num_heads // stack.num_kv_heads)

        def buffer(*shape: int) -> Tensor:
            return weight.new_zeros(shape)

        self._caches = [buffer(2, batch, stack.num_kv_heads, new_tokens, stack.d_kv) for _ in self._layers]
        self._across = [buffer(2, batch, stack.num_kv_heads, encoder_tokens, stack.d_kv) for _ in sources]
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._behind = torch.arange(new_tokens, device=weight.device)
        self.answers = torch.zeros(new_tokens, batch, dtype=torch.int64, device=weight.device)

    def read(self, hidden: Tensor) -> None:
        """Start answers to [batch, encoder_tokens, encoder d_model]: fill the keys and values of cross-attention."""
        stack = self.config.decoder
        for weight, across in zip(self._cross_kv, self._across, strict=True):
            made = functional.linear(hidden.to(weight.dtype), weight).unflatten(-1, (2, stack.num_kv_heads, stack.d_kv))
            across.copy_(made.permute(2, 0, 3, 1, 4))
        self._tokens.fill_(self.config.decoder_start_token_id)
        self._position.zero_()

    def step(self) -> None:
        """One token for every question, into `answers`."""
        logits = self.logits()
        logits[:, self.config.eos_token_id] = float("-inf")
        self._tokens.copy_(logits.argmax(-1))
        self.answers.index_copy_(0, self._position, self._tokens[None])
        self._position.add_(1)

    def logits(self) -> Tensor:
        """float[batch, vocab_size] of the next token; the caches get the keys and values of the one before it."""
        config, epsilon = self.config, self.config.layer_norm_epsilon
        distance = self._position - self._behind
        bias = self._bias[distance.clamp(0, len(self._bias) - 1)].permute(1, 2, 0).float()
        bias = bias.masked_fill(distance < 0, float("-inf"))  # [num_kv_heads, group, new_tokens]
        across = iter(self._across)
        x = functional.embedding(self._tokens, self._embedding)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            x = x + functional.linear(self._attend(layer, cache, rms_norm(x, layer.norm, epsilon), bias), layer.o)
            if layer.cross_norm is not None and layer.cross_q is not None and layer.cross_o is not None:
                query = self._by_head(functional.linear(rms_norm(x, layer.cross_norm, epsilon), layer.cross_q))
                x = x + functional.linear(self._cross_attend(query, *next(across)).flatten(1), layer.cross_o)
            gate, linear = functional.linear(rms_norm(x, layer.feed_forward_norm, epsilon), layer.wi).chunk(2, -1)
            x = x + functional.linear(functional.gelu(gate, approximate="tanh") * linear, layer.wo)
        return self._reader.logits(rms_norm(x, self._final_norm, config.layer_norm_epsilon))

    def _by_head(self, query: Tensor) -> Tensor:
        """[batch, num_heads * d_kv] -> [batch, num_kv_heads, group, d_kv]: the heads that share keys are rows of one product."""
        stack = self.config.decoder
        return query.unflatten(-1, (stack.num_kv_heads, stack.num_heads // stack.num_kv_heads, stack.d_kv))

    def _attend(self, layer: StepLayer, cache: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        stack = self.config.decoder
        made = functional.linear(x, layer.qkv)
        queries = stack.num_heads * stack.d_kv
        new = made[:, queries:].unflatten(-1, (2, stack.num_kv_heads, 1, stack.d_kv)).transpose(0, 1)
        cache.index_copy_(3, self._position, new)
        key, value = cache.unbind(0)
        scores = self._by_head(made[:, :queries]) @ key.transpose(-1, -2) + bias
        return (torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value).flatten(1)
