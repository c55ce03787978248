"""The three graphs that are exported for the CPU, built from a Reader's weights: encoder, cross_kv, decoder_step.

Each is a torch module whose forward takes and returns exactly the tensors of serving/contract/tensors.py. The graphs compute what
export/model/reader.py computes, in the form that an inference engine wants:

* weights are stored as [in, out], so that every projection is one MatMul on an initializer;
* the q, k and v projections are fused, and so are the gate and up projections;
* position biases are read from a table by distance;
* query heads are folded into rows, so that multi-query keys are read once and not once a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint.config import ReaderConfig
from export.model.layers import MASKED, Attention, FeedForward, RelativeBias, RMSNorm
from export.model.reader import DecoderLayer, EncoderLayer, Reader
from serving.contract.tensors import EngineSizes


def engine_sizes(config: ReaderConfig) -> EngineSizes:
    """What the shapes of the engines depend on."""
    return EngineSizes(
        d_model_encoder=config.encoder.d_model,
        d_model_decoder=config.decoder.d_model,
        num_decoder_layers=config.decoder.num_layers,
        cross_attention_layers=config.cross_attention_layers,
        num_heads=config.decoder.num_heads,
        num_kv_heads=config.decoder.num_kv_heads,
        d_kv=config.decoder.d_kv,
        vocab_size=config.vocab_size,
        reads_encoder_positions=config.cross_attention_relative_bias,
    )


class Projection(nn.Module):
    """One or several bias-free linear layers of the same input as one gemm; outputs lie side by side."""

    weight: Tensor

    def __init__(self, *linears: nn.Linear | nn.Embedding):
        super().__init__()
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]).t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """float[..., in] -> float[..., sum of outs], in the weights' type."""
        return torch.matmul(x.to(self.weight.dtype), self.weight)


class GraphNorm(nn.Module):
    """RMSNorm written as x / sqrt(mean(x^2) + eps): the form that inference engines recognise and run as one kernel.

    Its arithmetic and its weight are fp32 whatever the type of x.
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
    """FeedForward with both gated branches in one gemm."""

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
    """A relative bias as a table by clamped distance: one Gather instead of the bucket arithmetic."""

    table: Tensor

    def __init__(self, source: RelativeBias):
        super().__init__()
        self.reach = source.max_distance
        first = -self.reach if source.bidirectional else 0
        distances = torch.arange(first, self.reach + 1)
        # of a bidirectional table the query is at 0 and the key at the distance; of a unidirectional one the key lies that far behind
        keys = distances if source.bidirectional else -distances
        with torch.no_grad():
            table = source(torch.zeros(1, dtype=torch.int64), keys)  # [heads, 1, distances]
        self.first = first
        self.register_buffer("table", table[:, 0].t().contiguous())

    def forward(self, distance: Tensor) -> Tensor:
        """int32[...] distance (key minus query if bidirectional, else query minus key) -> float[..., heads]."""
        index = distance.clamp(self.first, self.reach) - self.first
        return functional.embedding(index, self.table)


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
        # fp16 ends at 65,504: a larger penalty would be an infinity, and 0 times that is not a number
        penalty = -3e4 if x.dtype == torch.float16 else MASKED
        bias = position_bias + (1 - attention_mask[:, None, None, :]).to(x.dtype) * penalty
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)


class CrossKVGraph(nn.Module):
    """`cross_kv_tensors`: a question's packed hidden states -> keys and values of every cross-attending layer."""

    def __init__(self, reader: Reader):
        super().__init__()
        stack = reader.config.decoder
        self.shape = (stack.num_kv_heads, stack.d_kv)
        sources = [reader.decoder.layers[i].cross_attention for i in reader.config.cross_attention_layers]
        self.projections = nn.ModuleList(Projection(linear) for source in sources for linear in (source.k, source.v))  # type: ignore[union-attr, arg-type]

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """float[encoder_sequence_length, d_model] -> float[num_kv_heads, encoder_sequence_length, d_kv], key and value a layer."""
        length = encoder_hidden_states.shape[0]
        return tuple(p(encoder_hidden_states).view(length, *self.shape).transpose(0, 1).contiguous() for p in self.projections)


class DecoderStepLayer(nn.Module):
    """DecoderLayer for one token a row, against caches."""

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
        """Attend to the cached positions and to the new one; returns the output and the new key and value rows.

        The new row is scored apart and joined at the scores, so that the cache itself is never copied.
        """
        batch = x.shape[0]
        queries = self.kv_heads * self.group * self.d_kv
        qkv = self.qkv(x)
        query = qkv[:, :queries].view(batch, self.kv_heads, self.group, self.d_kv)
        key, value = qkv[:, queries:].view(batch, 2, self.kv_heads, 1, self.d_kv).unbind(1)
        scores = torch.cat([torch.matmul(query, past_key.transpose(-1, -2)), (query * key).sum(-1, keepdim=True)], dim=-1)
        weights = torch.softmax(scores + bias, dim=-1)
        mixed = torch.matmul(weights[..., :-1], past_value) + weights[..., -1:] * value
        return self.o(mixed.reshape(batch, queries)), key[:, :, 0], value[:, :, 0]

    def attend_across(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x: float[batch, d_model] -> the same, and the weights summed over heads, float[batch, encoder_sequence_length].

        The query heads of a key/value head are the rows of one gemm.
        """
        batch = x.shape[0]
        query = self.cross_q(x).view(batch, self.kv_heads, self.group, self.d_kv)
        weights = torch.softmax(torch.matmul(query, key.transpose(-1, -2)) + bias, dim=-1)
        mixed = torch.matmul(weights, value).reshape(batch, self.kv_heads * self.group * self.d_kv)
        return self.cross_o(mixed), weights.sum(dim=(1, 2))


class DecoderStepGraph(nn.Module):
    """`decoder_step_tensors`: one token for a batch of running answers."""

    embedding: Tensor
    is_eos: Tensor

    def __init__(self, reader: Reader):
        super().__init__()
        config = reader.config
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
        """Inputs and outputs as `decoder_step_tensors` lists them, in that order."""
        decoder_input_ids, positions, encoder_lengths, eos_penalty, *rest = tensors
        encoder_positions = rest.pop(0) if self.cross_bias is not None else None
        past, cross = rest[: 2 * len(self.layers)], rest[2 * len(self.layers) :]
        x = functional.embedding(decoder_input_ids, self.embedding)
        dtype = x.dtype

        # behind: how far each cached token, and last the new one, lies behind the new token; what is not yet written lies ahead
        cached = torch.arange(past[0].shape[2], dtype=torch.int32, device=x.device)
        behind = torch.cat([positions[:, None] - cached[None, :], torch.zeros_like(positions)[:, None]], dim=1)
        unwritten = torch.cat([cached[None, :] >= positions[:, None], torch.zeros_like(positions, dtype=torch.bool)[:, None]], dim=1)
        self_bias = self._grouped(self.bias(behind)) + unwritten[:, None, None, :].to(dtype) * MASKED

        keys = torch.arange(cross[0].shape[2], dtype=torch.int32, device=x.device)
        cross_bias = (keys[None, :] >= encoder_lengths[:, None])[:, None, None, :].to(dtype) * MASKED
        if self.cross_bias is not None and encoder_positions is not None:
            cross_bias = cross_bias + self._grouped(self.cross_bias(positions[:, None] - encoder_positions))

        present: list[Tensor] = []
        attended: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderStepLayer)
            mixed, key, value = layer.self_attention(layer.self_attention_norm(x), past[2 * i], past[2 * i + 1], self_bias)
            present += [key, value]
            x = x + mixed
            if layer.cross_attends:
                j = 2 * self.cross_layers.index(i)
                across, weights = layer.attend_across(layer.cross_attention_norm(x), cross[j], cross[j + 1], cross_bias)
                x = x + across
                attended.append(weights)
            x = x + layer.feed_forward(layer.feed_forward_norm(x))
        x = self.final_norm(x)
        if self.output_scale is not None:
            x = x * self.output_scale
        logits = self.head(x).float() + eos_penalty[:, None] * self.is_eos[None, :]
        best, token = logits.max(dim=-1)
        log_prob = -torch.log(torch.exp(logits - best[:, None]).sum(-1))
        cross_attention = sum(attended[1:], attended[0]).float() * (1 / len(attended))
        return token.to(torch.int32), log_prob, cross_attention, *present
