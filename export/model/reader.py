"""FiD and FiDO as torch modules: the full pass that training and the parity tests use, and a cached greedy decoder.

Comes in: token ids. Goes out: logits, or greedy answers. The graphs that are exported are in export/graphs/ and use the same weights.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint.config import ReaderConfig, StackConfig

# The layers that both stacks are made of, as plain torch modules with no state but their weights.
#
# T5 departs from the textbook in ways that every function here keeps: attention scores are not divided by sqrt(d_kv) (the scale is
# folded into the initialisation), positions enter as a bias on the scores that all layers of a stack share, linear layers have no bias,
# and the norm only rescales.

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


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each on the normed residual."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        stack, epsilon = config.encoder, config.layer_norm_epsilon
        self.self_attention_norm = RMSNorm(stack.d_model, epsilon)
        self.self_attention = Attention(stack, stack.d_model)
        self.feed_forward_norm = RMSNorm(stack.d_model, epsilon)
        self.feed_forward = FeedForward(stack, config.feed_forward_proj)

    def forward(self, x: Tensor, bias: Tensor, dropout_rate: float) -> Tensor:
        """x: float[passages, passage_length, d_model] -> the same."""
        normed = self.self_attention_norm(x)
        x = x + functional.dropout(self.self_attention(normed, normed, bias), dropout_rate)
        return x + functional.dropout(self.feed_forward(self.feed_forward_norm(x)), dropout_rate)


class Encoder(nn.Module):
    """The T5 encoder, one passage a row: passages do not see each other."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.relative_bias = RelativeBias(config, config.encoder.num_heads, bidirectional=True)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder.num_layers))
        self.final_norm = RMSNorm(config.encoder.d_model, config.layer_norm_epsilon)

    def forward(self, embedded: Tensor, attention_mask: Tensor, dropout_rate: float = 0.0) -> Tensor:
        """Encode passages.

        Args:
            embedded: float[passages, passage_length, d_model].
            attention_mask: integer[passages, passage_length], 1 = attend.

        Returns:
            float[passages, passage_length, d_model]; rows of masked positions mean nothing.
        """
        positions = torch.arange(embedded.shape[1], device=embedded.device)
        masked = (1 - attention_mask[:, None, None, :].to(embedded.dtype)) * MASKED
        bias = (self.relative_bias(positions, positions) + masked).to(embedded.dtype)
        x = functional.dropout(embedded, dropout_rate)
        for layer in self.layers:
            x = layer(x, bias, dropout_rate)
        return self.final_norm(x)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention where the layer has it, feed-forward."""

    def __init__(self, config: ReaderConfig, *, cross_attends: bool):
        super().__init__()
        stack, epsilon = config.decoder, config.layer_norm_epsilon
        self.self_attention_norm = RMSNorm(stack.d_model, epsilon)
        self.self_attention = Attention(stack, stack.d_model)
        self.cross_attention_norm = RMSNorm(stack.d_model, epsilon) if cross_attends else None
        self.cross_attention = Attention(stack, config.encoder.d_model) if cross_attends else None
        self.feed_forward_norm = RMSNorm(stack.d_model, epsilon)
        self.feed_forward = FeedForward(stack, config.feed_forward_proj)

    def forward(self, x: Tensor, hidden: Tensor, self_bias: Tensor, cross_bias: Tensor, dropout_rate: float) -> Tensor:
        """x: float[batch, target_length, d_model] -> the same."""
        normed = self.self_attention_norm(x)
        x = x + functional.dropout(self.self_attention(normed, normed, self_bias), dropout_rate)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            x = x + functional.dropout(self.cross_attention(self.cross_attention_norm(x), hidden, cross_bias), dropout_rate)
        return x + functional.dropout(self.feed_forward(self.feed_forward_norm(x)), dropout_rate)


class Decoder(nn.Module):
    """The T5 decoder, with cross-attention in `config.cross_attention_layers` only."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        heads = config.decoder.num_heads
        self.relative_bias = RelativeBias(config, heads, bidirectional=False)
        self.cross_relative_bias = RelativeBias(config, heads, bidirectional=False) if config.cross_attention_relative_bias else None
        # layers are numbered once, here: a slice of the decoder must not restart the count that the period is taken of
        self.layers = nn.ModuleList(
            DecoderLayer(config, cross_attends=i in config.cross_attention_layers) for i in range(config.decoder.num_layers)
        )
        self.final_norm = RMSNorm(config.decoder.d_model, config.layer_norm_epsilon)

    def forward(self, embedded: Tensor, hidden: Tensor, hidden_mask: Tensor, key_positions: Tensor, dropout_rate: float = 0.0) -> Tensor:
        """Decode all target positions at once, each seeing those before it.

        Args:
            embedded: float[batch, target_length, d_model].
            hidden: float[batch, encoder_sequence_length, encoder d_model], the question's passages one after the other.
            hidden_mask: integer[batch, encoder_sequence_length], 1 = attend.
            key_positions: int64[batch or 1, encoder_sequence_length], place of each key in the padded sequence; read by the
                cross-attention bias of FiD's released checkpoints only.

        Returns:
            float[batch, target_length, d_model].
        """
        positions = torch.arange(embedded.shape[1], device=embedded.device)
        causal = (positions[None, :] > positions[:, None]).to(embedded.dtype) * MASKED
        self_bias = (self.relative_bias(positions, positions) + causal).to(embedded.dtype)[None]
        cross_bias = (1 - hidden_mask[:, None, None, :].to(embedded.dtype)) * MASKED
        if self.cross_relative_bias is not None:
            cross_bias = (cross_bias + self.cross_relative_bias(positions, key_positions)).to(embedded.dtype)
        x = functional.dropout(embedded, dropout_rate)
        for layer in self.layers:
            x = layer(x, hidden, self_bias, cross_bias, dropout_rate)
        return self.final_norm(x)


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy answers: `tokens[row]` without start token, ending in the end token unless cut by the limit; `log_probs` beside each."""

    tokens: list[list[int]]
    log_probs: list[list[float]]


class Reader(nn.Module):
    """A Fusion-in-Decoder reader: FiD or FiDO, as `config` says."""

    def __init__(self, config: ReaderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.encoder.d_model)
        self.decoder_embedding = None if config.shares_embedding else nn.Embedding(config.vocab_size, config.decoder.d_model)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.decoder.d_model, config.vocab_size, bias=False)
        self.dropout_rate = 0.0  # of every residual branch, while training

    @property
    def _dropout(self) -> float:
        return self.dropout_rate if self.training else 0.0

    def target_embedding(self) -> nn.Embedding:
        """The decoder's embedding: the encoder's own where the widths agree."""
        return self.embedding if self.decoder_embedding is None else self.decoder_embedding

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., decoder d_model] -> float[..., vocab_size]."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.decoder.d_model**-0.5
        return functional.linear(hidden, self.target_embedding().weight if self.lm_head is None else self.lm_head.weight)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode every passage by itself and lay a question's passages one after the other.

        Args:
            input_ids: integer[batch, n_passages, passage_length].
            attention_mask: integer[batch, n_passages, passage_length], 1 = attend.

        Returns:
            float[batch, n_passages * passage_length, d_model] and its mask, integer[batch, n_passages * passage_length].
        """
        batch, n_passages, passage_length = input_ids.shape
        mask = attention_mask.reshape(batch * n_passages, passage_length)
        hidden = self.encoder(self.embedding(input_ids.reshape(batch * n_passages, passage_length)), mask, self._dropout)
        return hidden.reshape(batch, n_passages * passage_length, -1), mask.reshape(batch, -1)

    def decode(self, decoder_input_ids: Tensor, hidden: Tensor, hidden_mask: Tensor, key_positions: Tensor | None = None) -> Tensor:
        """Logits of every target position; arguments as in `Decoder.forward`, positions counting up unless given.

        Returns:
            float[batch, target_length, vocab_size].
        """
        if key_positions is None:
            key_positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embedded = self.target_embedding()(decoder_input_ids)
        return self.logits(self.decoder(embedded, hidden, hidden_mask, key_positions, self._dropout))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Integer[batch, n_passages, passage_length] x2, integer[batch, target_length] -> float[batch, target_length, vocab_size]."""
        return self.decode(decoder_input_ids, *self.encode(input_ids, attention_mask))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, min_new_tokens: int = 0) -> Generation:
        """Greedy answers by the plainest means, the full pass again for every token: the reference that served answers must equal.

        Args:
            input_ids: integer[batch, n_passages, passage_length].
            attention_mask: integer[batch, n_passages, passage_length], 1 = attend.
            max_new_tokens: tokens at most, the end token included.
            min_new_tokens: tokens at least, the end token included.
        """
        hidden, mask = self.encode(input_ids, attention_mask)
        rows = len(input_ids)
        so_far = torch.full((rows, 1), self.config.decoder_start_token_id, dtype=torch.int64, device=input_ids.device)
        result = Generation([[] for _ in range(rows)], [[] for _ in range(rows)])
        running = [True] * rows
        for step in range(max_new_tokens):
            logits = self.decode(so_far, hidden, mask)[:, -1].float()
            if step < min_new_tokens - 1:
                logits[:, self.config.eos_token_id] = float("-inf")
            best, chosen = torch.log_softmax(logits, -1).max(-1)
            for row, (token, log_prob) in enumerate(zip(chosen.tolist(), best.tolist(), strict=True)):
                if running[row]:
                    result.tokens[row].append(token)
                    result.log_probs[row].append(log_prob)
                    running[row] = token != self.config.eos_token_id
            if not any(running):
                break
            so_far = torch.cat([so_far, chosen[:, None]], 1)
        return result

    def reset_parameters(self, seed: int) -> None:
        """Random weights with T5's scales, the same for the same seed; for training from scratch and for full-size benchmarks."""
        generator = torch.Generator().manual_seed(seed)

        def fill(weight: Tensor, std: float) -> None:
            weight.data.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))

        for name, module in self.named_modules():
            if isinstance(module, Attention):
                # q carries the 1/sqrt(d_kv) that the scores are not divided by
                fill(module.q.weight, (module.q.in_features * module.d_kv) ** -0.5)
                for linear in (module.k, module.v, module.o):
                    fill(linear.weight, linear.in_features**-0.5)
            elif isinstance(module, FeedForward):
                for child in module.children():
                    if isinstance(child, nn.Linear):
                        fill(child.weight, child.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                fill(module.weight, 1.0)
            elif isinstance(module, RelativeBias):
                fill(module.weight, module.weight.shape[1] ** -0.5)
            elif isinstance(module, RMSNorm):
                module.weight.data.fill_(1.0)
            elif name == "lm_head":
                fill(module.weight, self.config.decoder.d_model**-0.5)
