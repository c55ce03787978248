"""The training pass of a reader over packed passages: logits, cross-attention mass of each passage, losses, and the operations of a step.

In: a Reader and `PackedBatch`es. Out: what `Reader.forward` computes on the padded batch (tests compare them), without its padding. The
encoder reads chunks of passages of like length, each recomputed in the backward pass if asked; cross-attention reads only tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from export.checkpoint.config import ReaderConfig
from export.model.reader import MASKED, Attention, Reader
from training.fit.fid_data import PackedBatch

ATTENTIONS = ("sdpa", "flex")


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """float[batch, length, heads * d_kv] -> float[batch, heads, length, d_kv]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _self_attention(module: Attention, x: Tensor, bias: Tensor, lengths: Tensor | None) -> Tensor:
    """The encoder's self-attention; with `lengths` by flex_attention, which reads one bias for all passages and needs no mask."""
    query, key, value = (_heads(linear(x), module.num_heads) for linear in (module.q, module.k, module.v))
    if lengths is None:
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    else:
        from torch.nn.attention.flex_attention import flex_attention

        def scored(score: Tensor, row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(j < lengths[row], score + bias[head, i, j], -float("inf"))

        mixed = flex_attention(query, key, value, score_mod=scored, scale=1.0)
    return module.o(mixed.transpose(1, 2).flatten(2))


def _encoder_layer(layer: Any, x: Tensor, bias: Tensor, lengths: Tensor | None, dropout: float) -> Tensor:
    """An EncoderLayer."""
    x = x + _dropped(_self_attention(layer.self_attention, layer.self_attention_norm(x).to(x.dtype), bias, lengths), dropout)
    return x + _dropped(layer.feed_forward(layer.feed_forward_norm(x).to(x.dtype)), dropout)


def _dropped(x: Tensor, rate: float) -> Tensor:
    return functional.dropout(x, rate) if rate else x


def _cross_attention(module: Attention, x: Tensor, hidden: Tensor, bias: Tensor, passages: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cross-attention, and the share of it that goes to each passage.

    Args:
        module: of a decoder layer.
        x: float[batch, target_length, d_model].
        hidden: float[batch, encoder_sequence_length, encoder d_model].
        bias: float[batch or 1, heads or 1, target_length or 1, encoder_sequence_length].
        passages: float[batch, encoder_sequence_length, n_passages], 1 where a token belongs to a passage; None: no shares wanted.

    Returns:
        float[batch, target_length, d_model], and float[batch, target_length, n_passages], the mean over the heads.
    """
    batch, length, _ = x.shape
    groups, per_group = module.num_kv_heads, module.num_heads // module.num_kv_heads
    # The heads that share keys and values become rows of one product: these are not repeated.
    query = module.q(x).view(batch, length, groups, per_group, module.d_kv).permute(0, 2, 3, 1, 4).flatten(2, 3)
    key, value = _heads(module.k(hidden), groups), _heads(module.v(hidden), groups)
    if bias.shape[1] != 1 or bias.shape[2] != 1:
        bias = bias.expand(-1, module.num_heads, length, -1).unflatten(1, (groups, per_group)).flatten(2, 3)
    if passages is None:
        mask = bias.to(query.dtype).expand(batch, -1, query.shape[2], -1)
        mixed, shares = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0), None
    else:
        weights = torch.softmax((query @ key.transpose(2, 3)).float() + bias, -1)
        mixed = weights.to(value.dtype) @ value
        by_head = weights.unflatten(2, (per_group, length)).flatten(1, 2)
        shares = by_head.mean(1).to(passages.dtype) @ passages
    mixed = mixed.unflatten(2, (per_group, length)).permute(0, 3, 1, 2, 4).flatten(2)
    return module.o(mixed), shares


def _decoder_layer(
    layer: Any, x: Tensor, hidden: Tensor, self_bias: Tensor, cross_bias: Tensor, passages: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor | None]:
    normed = layer.self_attention_norm(x).to(x.dtype)
    x = x + _dropped(layer.self_attention(normed, normed, self_bias), dropout)
    shares = None
    if layer.cross_attention is not None and layer.cross_attention_norm is not None:
        mixed, shares = _cross_attention(layer.cross_attention, layer.cross_attention_norm(x).to(x.dtype), hidden, cross_bias, passages)
        x = x + _dropped(mixed, dropout)
    return x + _dropped(layer.feed_forward(layer.feed_forward_norm(x).to(x.dtype)), dropout), shares


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # student and teacher, with and without gradient, padding and shares: each is a code of its own, none for every layer
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function)


@dataclasses.dataclass(frozen=True)
class Pass:
    """How a training pass computes.

    Attributes:
        bfloat16: autocast, with the residual stream in bfloat16; the weights stay as they are.
        recompute: gradient checkpointing: keep the encoder's output of each chunk of passages alone.
        compile: torch.compile of the layers.
        attention: of the encoder, one of `ATTENTIONS`.
        dropout: rate on every residual branch.
    """

    bfloat16: bool = False
    recompute: bool = False
    compile: bool = False
    attention: str = "sdpa"
    dropout: float = 0.0


class PackedReader(nn.Module):
    """A reader over packed passages; it owns no weights but those of `reader`."""

    def __init__(self, reader: Reader, options: Pass):
        super().__init__()
        self.reader, self.options = reader, options
        self._encoder_layer = _compiled(_encoder_layer) if options.compile else _encoder_layer
        self._decoder_layer = _compiled(_decoder_layer) if options.compile else _decoder_layer

    def _autocast(self) -> torch.autocast:
        device = self.reader.embedding.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.options.bfloat16)

    @property
    def _dropout(self) -> float:
        return self.options.dropout if self.training else 0.0

    def _chunk(self, ids: Tensor, lengths: Tensor, padded: bool) -> Tensor:
        """int64[passages, length] -> float[passages * length, d_model]."""
        encoder = self.reader.encoder
        x = self.reader.embedding(ids)
        x = _dropped(x.bfloat16() if self.options.bfloat16 else x, self._dropout)
        positions = torch.arange(ids.shape[1], device=ids.device)
        bias = encoder.relative_bias(positions, positions)
        flex = self.options.attention == "flex"
        if not flex:
            # one bias for all passages where none has padding: otherwise it and its gradient are as large as the scores
            bias = (bias + self._padding(positions, lengths) if padded else bias[None]).to(x.dtype)
        for layer in encoder.layers:
            x = self._encoder_layer(layer, x, bias, lengths if flex else None, self._dropout)
        return encoder.final_norm(x).to(x.dtype).flatten(0, 1)

    @staticmethod
    def _padding(positions: Tensor, lengths: Tensor) -> Tensor:
        return (positions >= lengths[:, None]).float()[:, None, None, :] * MASKED

    def encode(self, batch: PackedBatch) -> Tensor:
        """float[batch, encoder_sequence_length, d_model], zero behind a question's last token."""
        with self._autocast():
            parts = []
            for chunk in zip(batch.chunks, batch.chunk_lengths, batch.padded, strict=True):
                if self.options.recompute and torch.is_grad_enabled():
                    parts.append(checkpoint(self._chunk, *chunk, use_reentrant=False))
                else:
                    parts.append(self._chunk(*chunk))
            hidden = torch.cat(parts)[batch.gather]
            return hidden * batch.mask[..., None].to(hidden.dtype)

    def decode(self, decoder_input_ids: Tensor, hidden: Tensor, batch: PackedBatch, *, shares: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of every target position, and the share of cross-attention that goes to each passage.

        Args:
            decoder_input_ids: int64[batch, target_length].
            hidden: from `encode`.
            batch: the same batch.
            shares: whether the shares are wanted.

        Returns:
            float[batch, target_length, vocab_size]; float[batch, target_length, n_passages], the mean over heads and layers.
        """
        reader, decoder = self.reader, self.reader.decoder
        with self._autocast():
            x = reader.target_embedding()(decoder_input_ids)
            x = _dropped(x.bfloat16() if self.options.bfloat16 else x, self._dropout)
            positions = torch.arange(x.shape[1], device=x.device)
            causal = (positions[None, :] > positions[:, None]).float() * MASKED
            self_bias = (decoder.relative_bias(positions, positions) + causal).to(x.dtype)[None]
            cross_bias = (1 - batch.mask[:, None, None, :].float()) * MASKED
            if decoder.cross_relative_bias is not None:
                cross_bias = cross_bias + decoder.cross_relative_bias(positions, batch.key_positions)
            passages = None
            if shares:
                passages = functional.one_hot(batch.passage, batch.n_passages).float() * batch.mask[..., None]
            found = []
            for layer in decoder.layers:
                x, share = self._decoder_layer(layer, x, hidden, self_bias, cross_bias, passages, self._dropout)
                found += [] if share is None else [share]
            logits = reader.logits(decoder.final_norm(x).to(x.dtype)).float()
        return logits, torch.stack(found).mean(0) if found else None

    def forward(self, batch: PackedBatch, *, shares: bool = False) -> tuple[Tensor, Tensor | None]:
        """`decode` of the batch's own targets, each position seeing those before it."""
        start = self.reader.config.decoder_start_token_id
        shifted = functional.pad(batch.targets, (1, 0), value=start)[:, :-1].clamp(min=0)
        return self.decode(shifted, self.encode(batch), batch, shares=shares)

    @torch.no_grad()
    def answers(self, batch: PackedBatch, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, without start and end token."""
        config = self.reader.config
        hidden = self.encode(batch)
        so_far = torch.full((len(hidden), 1), config.decoder_start_token_id, device=hidden.device)
        ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        for _ in range(max_new_tokens):
            chosen = self.decode(so_far, hidden, batch, shares=False)[0][:, -1].argmax(-1)
            so_far = torch.cat([so_far, chosen[:, None]], 1)
            ended |= chosen == config.eos_token_id
            if bool(ended.all()):
                break
        rows = so_far[:, 1:].tolist()
        return [row[: row.index(config.eos_token_id)] if config.eos_token_id in row else row for row in rows]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the losses; all are means over target tokens, `passages` over questions.

    Attributes:
        answers: cross-entropy of the answers' tokens.
        logits: Kullback-Leibler divergence of the teacher's next-token distribution from the reader's, times temperature squared.
        passages: that of the cross-attention mass of the passages, averaged over target tokens, heads and layers.
        temperature: of both distributions in `logits`.
    """

    answers: float = 1.0
    logits: float = 1.0
    passages: float = 0.1
    temperature: float = 1.0

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return self.logits > 0 or self.passages > 0


class Objective(nn.Module):
    """The loss of a batch as a share of a larger one, so that parts of any size add up to it."""

    def __init__(self, student: PackedReader, weights: LossWeights):
        super().__init__()
        self.student, self.weights = student, weights

    def forward(
        self, batch: PackedBatch, taught: tuple[Tensor, Tensor | None] | None, target_tokens: int, questions: int
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, and each loss by itself without gradient.

        Args:
            batch: a part of the step's batch.
            taught: what the teacher's `forward` gave for it; None without distillation.
            target_tokens: in the step's batch.
            questions: in the step's batch.

        Returns:
            float[]; float[3] for answers, logits and passages.
        """
        weights = self.weights
        logits, shares = self.student(batch, shares=taught is not None and weights.passages > 0)
        valid = batch.targets != -100
        answers = (
            functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum") / target_tokens
        )
        distilled = passages = torch.zeros_like(answers)
        if taught is not None and weights.logits > 0:
            warm = weights.temperature
            teacher = torch.log_softmax(taught[0] / warm, -1)
            each = functional.kl_div(torch.log_softmax(logits / warm, -1), teacher, reduction="none", log_target=True).sum(-1)
            distilled = (each * valid).sum() * warm**2 / target_tokens
        if taught is not None and shares is not None and taught[1] is not None:
            mine, teachers = (((one * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)) for one in (shares, taught[1]))
            passages = functional.kl_div((mine + 1e-9).log(), teachers, reduction="sum") / questions
        loss = weights.answers * answers + weights.logits * distilled + weights.passages * passages
        return loss, torch.stack([answers, distilled, passages]).detach()


def forward_flops(config: ReaderConfig, batch: PackedBatch) -> float:
    """Floating-point operations of one pass over the tokens of a batch, two per multiply-add; padding and recomputation do not count."""
    encoder, decoder = config.encoder, config.decoder
    branches = 3 if config.feed_forward_proj == "gated-gelu" else 2
    inner = encoder.num_heads * encoder.d_kv
    encoder_weights = encoder.num_layers * (4 * encoder.d_model * inner + branches * encoder.d_model * encoder.d_ff)
    cross = len(config.cross_attention_layers)
    cross_kv = cross * 2 * encoder.d_model * decoder.num_kv_heads * decoder.d_kv
    wide = decoder.num_heads * decoder.d_kv
    decoder_weights = decoder.num_layers * (
        2 * decoder.d_model * (wide + decoder.num_kv_heads * decoder.d_kv) + branches * decoder.d_model * decoder.d_ff
    )
    decoder_weights += cross * 2 * decoder.d_model * wide + config.vocab_size * decoder.d_model
    targets = int((batch.targets != -100).sum())
    scores = 2 * encoder.num_layers * batch.squares * inner + 2 * cross * wide * batch.targets.shape[1] * batch.tokens
    return 2.0 * (batch.tokens * (encoder_weights + cross_kv) + targets * decoder_weights + scores)
