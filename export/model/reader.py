"""FiD and FiDO as torch modules: the full pass that training and the parity tests use, and a cached greedy decoder.

Comes in: token ids. Goes out: logits, or greedy answers. The graphs that are exported are in graphs.py and use the same weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint.config import ReaderConfig

from .layers import MASKED, Attention, FeedForward, RelativeBias, RMSNorm


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
