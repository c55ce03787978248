"""The three graphs that are exported for the CPU, built from a Reader's weights: encoder, cross_kv, decoder_step.

Each graph is a torch module whose forward takes and returns exactly the tensors of serving/contract/tensors.py. The graphs compute the same
as export/model/reader.py, in a form that inference engines run fast:

* weights are stored as [in, out], so that every projection is one MatMul on an initializer;
* the q, k and v projections are fused, and so are the gate and up projections;
* position biases are read from a table by distance;
* query heads are folded into rows, so that multi-query keys are read once and not once per head.

Exporting the graphs is the task of onnx_export.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.manifest_writer import engine_sizes as engine_sizes
from export.model.reader import MASKED, Attention, DecoderLayer, EncoderLayer, FeedForward, Reader, RelativeBias, RMSNorm


class Projection(nn.Module):
    """One or several bias-free linear layers of the same input as one GEMM, with their outputs concatenated."""

    weight: Tensor

    def __init__(self, *linears: nn.Linear | nn.Embedding):
        super().__init__()
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]).t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in_features] -> float[..., sum of out_features], in the type of the weights."""
        return torch.matmul(x.to(self.weight.dtype), self.weight)


class GraphNorm(nn.Module):
    """RMSNorm written as x / sqrt(mean(x^2) + eps): inference engines recognise this form and run it as one kernel.

    Arithmetic and weight are fp32, whatever the type of x.
    """

    weight: Tensor

    def __init__(self, source: RMSNorm):
        super().__init__()
        self.register_buffer("weight", source.weight.detach())
        self.epsilon = source.epsilon

    def forward(self, x: Tensor) -> Tensor:
        """float[..., d_model] -> the same."""
        wide = x.float()
        return (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight).to(x.dtype)


class FusedFeedForward(nn.Module):
    """FeedForward with both branches of the gated form in one GEMM."""

    def __init__(self, source: FeedForward):
        super().__init__()
        self.gated = source.gated
        self.wi = Projection(source.wi_0, source.wi_1) if source.gated else Projection(source.wi)
        self.wo = Projection(source.wo)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., d_model] -> the same."""
        if not self.gated:
            return self.wo(functional.relu(self.wi(x)))
        gate, linear = self.wi(x).chunk(2, dim=-1)
        return self.wo(functional.gelu(gate, approximate="tanh") * linear)


class BiasTable(nn.Module):
    """A relative bias as a table by clamped distance: one Gather replaces the bucket arithmetic."""

    table: Tensor

    def __init__(self, source: RelativeBias):
        super().__init__()
        self.max_distance = source.max_distance
        first = -self.max_distance if source.bidirectional else 0
        distances = torch.arange(first, self.max_distance + 1)
        # the query is at 0; the key is at the distance in a bidirectional table, and that far behind it in a unidirectional one
        keys = distances if source.bidirectional else -distances
        with torch.no_grad():
            table = source(torch.zeros(1, dtype=torch.int64), keys)  # [heads, 1, distances]
        self.first = first
        self.register_buffer("table", table[:, 0].t().contiguous())

    def forward(self, distance: Tensor) -> Tensor:
        """int32[...] distance, key minus query if bidirectional, else query minus key -> float[..., heads]."""
        index = distance.clamp(self.first, self.max_distance) - self.first
        return functional.embedding(index, self.table)


def _penalty(dtype: torch.dtype) -> float:
    """What is added to a masked score. The largest fp16 number is 65,504: a larger penalty would be infinite, and 0 * infinity is NaN."""
    return -3e4 if dtype == torch.float16 else MASKED


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, in fp32: a question has thousands of keys."""
    return torch.softmax(scores, dim=-1) if scores.dtype == torch.float32 else torch.softmax(scores.float(), dim=-1).to(scores.dtype)


class EncoderGraphLayer(nn.Module):
    """EncoderLayer with fused projections."""

    def __init__(self, source: EncoderLayer):
        super().__init__()
        attention = source.self_attention
        self.heads, self.d_kv = attention.num_heads, attention.d_kv
        self.self_attention_norm, self.feed_forward_norm = GraphNorm(source.self_attention_norm), GraphNorm(source.feed_forward_norm)
        self.qkv = Projection(attention.q, attention.k, attention.v)
        self.o = Projection(attention.o)
        self.feed_forward = FusedFeedForward(source.feed_forward)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: float[passages, passage_length, d_model] -> the same."""
        passages, length, _ = x.shape
        qkv = self.qkv(self.self_attention_norm(x)).view(passages, length, 3, self.heads, self.d_kv)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(torch.matmul(query, key.transpose(-1, -2)) + bias, dim=-1)
        mixed = torch.matmul(weights, value).transpose(1, 2).reshape(passages, length, self.heads * self.d_kv)
        x = x + self.o(mixed)
        return x + self.feed_forward(self.feed_forward_norm(x))


class EncoderGraph(nn.Module):
    """`encoder_tensors`: token ids and mask of passages -> their hidden states."""

    embedding: Tensor

    def __init__(self, reader: Reader):
        super().__init__()
        self.register_buffer("embedding", reader.embedding.weight.detach())
        self.bias = BiasTable(reader.encoder.relative_bias)
        self.layers = nn.ModuleList(EncoderGraphLayer(layer) for layer in reader.encoder.layers)  # type: ignore[arg-type]
        self.final_norm = GraphNorm(reader.encoder.final_norm)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int32[passages, passage_length] x2 -> float[passages, passage_length, d_model]."""
        positions = torch.arange(input_ids.shape[1], dtype=torch.int32, device=input_ids.device)
        position_bias = self.bias(positions[None, :] - positions[:, None]).permute(2, 0, 1)[None]
        x = functional.embedding(input_ids, self.embedding)
        bias = position_bias + (1 - attention_mask[:, None, None, :]).to(x.dtype) * _penalty(x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)


class CrossKVGraph(nn.Module):
    """`cross_kv_tensors`: the packed hidden states of a question -> keys and values of every cross-attending layer."""

    def __init__(self, reader: Reader):
        super().__init__()
        stack = reader.config.decoder
        self.shape = (stack.num_kv_heads, stack.d_kv)
        sources = [reader.decoder.layers[i].cross_attention for i in reader.config.cross_attention_layers]
        self.projections = nn.ModuleList(Projection(linear) for source in sources for linear in (source.k, source.v))  # type: ignore[union-attr, arg-type]

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """float[encoder_sequence_length, d_model] -> float[num_kv_heads, encoder_sequence_length, d_kv], a key and a value per layer."""
        length = encoder_hidden_states.shape[0]
        return tuple(p(encoder_hidden_states).view(length, *self.shape).transpose(0, 1).contiguous() for p in self.projections)


Beams = tuple[Tensor, Tensor]
"""question_rows and row_places of `decoder_step_tensors`."""


class DecoderStepLayer(nn.Module):
    """DecoderLayer for one token per row, against caches."""

    def __init__(self, source: DecoderLayer):
        super().__init__()
        attention = source.self_attention
        self.kv_heads, self.d_kv = attention.num_kv_heads, attention.d_kv
        self.group = attention.num_heads // attention.num_kv_heads
        self.self_attention_norm, self.feed_forward_norm = GraphNorm(source.self_attention_norm), GraphNorm(source.feed_forward_norm)
        self.qkv = Projection(attention.q, attention.k, attention.v)
        self.o = Projection(attention.o)
        cross: Attention | None = source.cross_attention
        self.cross_attends = cross is not None
        if cross is not None and source.cross_attention_norm is not None:
            self.cross_attention_norm = GraphNorm(source.cross_attention_norm)
            self.cross_q, self.cross_o = Projection(cross.q), Projection(cross.o)
        self.feed_forward = FusedFeedForward(source.feed_forward)

    def self_attention(self, x: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the cached positions and to the new one.

        The new row is scored separately and concatenated at the scores, so that the cache itself is never copied.

        Args:
            x: float[batch, d_model].
            past_key: float[batch, num_kv_heads, past_length, d_kv].
            past_value: float[batch, num_kv_heads, past_length, d_kv].
            bias: float[batch, num_kv_heads, group, past_length + 1], position bias and mask.

        Returns:
            float[batch, d_model], and the new key and value, float[batch, num_kv_heads, d_kv] each.
        """
        batch = x.shape[0]
        queries = self.kv_heads * self.group * self.d_kv
        qkv = self.qkv(x)
        query = qkv[:, :queries].view(batch, self.kv_heads, self.group, self.d_kv)
        key, value = qkv[:, queries:].view(batch, 2, self.kv_heads, 1, self.d_kv).unbind(1)
        scores = torch.cat([torch.matmul(query, past_key.transpose(-1, -2)), (query * key).sum(-1, keepdim=True)], dim=-1)
        weights = _softmax(scores + bias)
        mixed = torch.matmul(weights[..., :-1], past_value) + weights[..., -1:] * value
        return self.o(mixed.reshape(batch, queries)), key[:, :, 0], value[:, :, 0]

    def attend_across_beams(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor, beams: Beams) -> tuple[Tensor, Tensor]:
        """As attend_across, where the sequences of a question are further rows of its GEMM: its keys are read once and never copied.

        Args:
            x: float[batch, d_model].
            key: float[questions, num_kv_heads, encoder_sequence_length, d_kv].
            value: float[questions, num_kv_heads, encoder_sequence_length, d_kv].
            bias: float[questions, num_kv_heads or 1, group or 1, encoder_sequence_length], mask and position bias.
            beams: int32[questions, beams] and int32[batch], as in `decoder_step_tensors`.

        Returns:
            float[batch, d_model], and the attention weights of each question's first sequence, float[questions, encoder_sequence_length].
        """
        question_rows, row_places = beams
        questions, count = question_rows.shape
        heads, length = self.kv_heads * self.group, key.shape[2]
        query = functional.embedding(question_rows, self.cross_q(x)).view(questions, count, self.kv_heads, self.group, self.d_kv)
        query = query.transpose(1, 2).reshape(questions, self.kv_heads, count * self.group, self.d_kv)
        scores = torch.matmul(query, key.transpose(-1, -2)).view(questions, self.kv_heads, count, self.group, length)
        weights = _softmax(scores + bias[:, :, None])
        mixed = torch.matmul(weights.view(questions, self.kv_heads, count * self.group, length), value)
        mixed = mixed.view(questions, self.kv_heads, count, self.group, self.d_kv).transpose(1, 2)
        rows = functional.embedding(row_places, mixed.reshape(questions * count, heads * self.d_kv))
        return self.cross_o(rows), weights[:, :, 0].sum(dim=(1, 2))

    def attend_across(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the encoded passages; the query heads of a key/value head are the rows of one GEMM.

        Args:
            x: float[batch, d_model].
            key: float[batch, num_kv_heads, encoder_sequence_length, d_kv].
            value: float[batch, num_kv_heads, encoder_sequence_length, d_kv].
            bias: float[batch, num_kv_heads or 1, group or 1, encoder_sequence_length], mask and position bias.

        Returns:
            float[batch, d_model], and the attention weights summed over heads, float[batch, encoder_sequence_length].
        """
        batch = x.shape[0]
        query = self.cross_q(x).view(batch, self.kv_heads, self.group, self.d_kv)
        weights = _softmax(torch.matmul(query, key.transpose(-1, -2)) + bias)
        mixed = torch.matmul(weights, value).reshape(batch, self.kv_heads * self.group * self.d_kv)
        return self.cross_o(mixed), weights.sum(dim=(1, 2))


class DecoderStepGraph(nn.Module):
    """`decoder_step_tensors`: one token for a batch of running sequences; with `beams`, several may belong to one question."""

    embedding: Tensor
    is_eos: Tensor

    def __init__(self, reader: Reader, *, beams: bool = False):
        super().__init__()
        config = reader.config
        self.beams = beams
        self.cross_layers = config.cross_attention_layers
        self.kv_heads, self.group = config.decoder.num_kv_heads, config.decoder.num_heads // config.decoder.num_kv_heads
        self.register_buffer("embedding", reader.target_embedding().weight.detach())
        self.bias = BiasTable(reader.decoder.relative_bias)
        cross_bias = reader.decoder.cross_relative_bias
        self.cross_bias = None if cross_bias is None else BiasTable(cross_bias)
        self.layers = nn.ModuleList(DecoderStepLayer(layer) for layer in reader.decoder.layers)  # type: ignore[arg-type]
        self.final_norm = GraphNorm(reader.decoder.final_norm)
        self.output_scale = config.decoder.d_model**-0.5 if config.scale_decoder_outputs else None
        self.head = Projection(reader.target_embedding() if reader.lm_head is None else reader.lm_head)
        end = torch.zeros(config.vocab_size)
        end[config.eos_token_id] = 1.0
        self.register_buffer("is_eos", end)

    def _grouped(self, bias: Tensor) -> Tensor:
        """float[batch, length, heads] -> float[batch, kv_heads, group, length]."""
        return bias.permute(0, 2, 1).unflatten(1, (self.kv_heads, self.group))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Take the inputs of `decoder_step_tensors` in their order; return its outputs in theirs."""
        decoder_input_ids, positions, encoder_lengths, eos_penalty, *rest = tensors
        beams = (rest.pop(0), rest.pop(0)) if self.beams else None
        encoder_positions = rest.pop(0) if self.cross_bias is not None else None
        past, cross = rest[: 2 * len(self.layers)], rest[2 * len(self.layers) :]
        x = functional.embedding(decoder_input_ids, self.embedding)
        dtype = x.dtype

        # behind: distance of each cached token behind the new one, then 0 for the new one itself; cells not yet written are masked.
        # Whole numbers are joined and then compared: TensorRT 8.6 refuses to join truth values along an axis of dynamic length.
        cached = torch.arange(past[0].shape[2], dtype=torch.int32, device=x.device)
        distance = positions[:, None] - cached[None, :]
        behind = torch.cat([distance, torch.zeros_like(positions)[:, None]], dim=1)
        unwritten = torch.cat([distance, torch.ones_like(positions)[:, None]], dim=1) < 1
        self_bias = self._grouped(self.bias(behind)) + unwritten[:, None, None, :].to(dtype) * _penalty(dtype)

        keys = torch.arange(cross[0].shape[2], dtype=torch.int32, device=x.device)
        cross_bias = (keys[None, :] >= encoder_lengths[:, None])[:, None, None, :].to(dtype) * _penalty(dtype)
        if self.cross_bias is not None and encoder_positions is not None:
            # the sequences of a question are at one position: that of the first
            of_questions = positions if beams is None else functional.embedding(beams[0][:, 0], positions[:, None])[:, 0]
            cross_bias = cross_bias + self._grouped(self.cross_bias(of_questions[:, None] - encoder_positions))

        present: list[Tensor] = []
        attended: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderStepLayer)
            mixed, key, value = layer.self_attention(layer.self_attention_norm(x), past[2 * i], past[2 * i + 1], self_bias)
            present += [key, value]
            x = x + mixed
            if layer.cross_attends:
                j = 2 * self.cross_layers.index(i)
                normed, key, value = layer.cross_attention_norm(x), cross[j], cross[j + 1]
                if beams is None:
                    across, weights = layer.attend_across(normed, key, value, cross_bias)
                else:
                    across, weights = layer.attend_across_beams(normed, key, value, cross_bias, beams)
                x = x + across
                attended.append(weights)
            x = x + layer.feed_forward(layer.feed_forward_norm(x))
        x = self.final_norm(x)
        if self.output_scale is not None:
            x = x * self.output_scale
        logits = self.head(x).float() + eos_penalty[:, None] * self.is_eos[None, :]
        largest, token = logits.max(dim=-1)
        log_prob = -torch.log(torch.exp(logits - largest[:, None]).sum(-1))
        cross_attention = sum(attended[1:], attended[0]).float() * (1 / len(attended))
        return token.to(torch.int32), log_prob, cross_attention, *present, *([] if beams is None else [logits])
