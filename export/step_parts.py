"""The graphs of a reader for the GPU: the decoder step in parts between its attentions, and cross_kv with packed outputs.

They are built from the same modules as graphs.py and hold the same weights; serving/step_parts.py says how the step is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from serving.step_parts import StepPart

from .graphs import DecoderStepLayer, GraphNorm, Projection
from .layers import Attention
from .model import Reader


class PackedCrossKVGraph(nn.Module):
    """`packed_cross_kv_tensors`: a question's packed hidden states -> keys and values of every cross-attending layer, token by token."""

    def __init__(self, reader: Reader):
        super().__init__()
        attentions: list[Attention] = [reader.decoder.layers[i].cross_attention for i in reader.config.cross_attention_layers]  # type: ignore[misc]
        self.projections = nn.ModuleList(Projection(a.k, a.v) for a in attentions)

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """float[encoder_sequence_length, d_model] -> float[encoder_sequence_length, 2 * num_kv_heads * d_kv] a layer."""
        return tuple(projection(encoder_hidden_states) for projection in self.projections)


class StepPartGraph(nn.Module):
    """`step_part_tensors`: from one attention's output to the next one's queries."""

    def __init__(self, reader: Reader, part: StepPart):
        super().__init__()
        self.part = part
        after, before = part.after, part.before
        self.embedding: Tensor | None
        self.register_buffer("embedding", reader.target_embedding().weight.detach() if after is None else None)
        layers = reader.decoder.layers
        done = None if after is None else DecoderStepLayer(layers[after.layer])  # type: ignore[arg-type]
        self.o = None
        if done is not None and after is not None:
            self.o = done.o if after.kind == "self" else done.cross_o
        # the layer ends with this part unless its cross-attention comes next
        ends_layer = done is not None and (before is None or before.kind == "self")
        self.feed_forward = done.feed_forward if done is not None and ends_layer else None
        self.feed_forward_norm = done.feed_forward_norm if done is not None and ends_layer else None
        if before is None:
            self.norm, self.project = GraphNorm(reader.decoder.final_norm), Projection(reader.lm_head or reader.target_embedding())
        else:
            coming = DecoderStepLayer(layers[before.layer])  # type: ignore[arg-type]
            own = before.kind == "self"
            self.norm = coming.self_attention_norm if own else coming.cross_attention_norm
            self.project = coming.qkv if own else coming.cross_q
        config = reader.config
        self.output_scale = config.decoder.d_model**-0.5 if before is None and config.scale_decoder_outputs else None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs and outputs as `step_part_tensors` lists them, in that order."""
        if self.embedding is not None:
            x = functional.embedding(tensors[0], self.embedding).float()
        else:
            residual, attended = tensors
            assert self.o is not None
            x = residual + self.o(attended).float()
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x)).float()
        normed = self.norm(x)
        if self.output_scale is not None:
            normed = normed * self.output_scale
        projected = self.project(normed).float()
        return (projected,) if self.part.before is None else (x, projected)


def relative_bias_by_distance(reader: Reader) -> dict[str, Tensor]:
    """The biases that the attention kernels read: name -> float32[max_distance + 1, num_heads], by how far a key lies behind the query."""
    decoder = reader.decoder
    found = {"self_attention_bias": decoder.relative_bias.by_distance()}
    if decoder.cross_relative_bias is not None:
        found["cross_attention_bias"] = decoder.cross_relative_bias.by_distance()
    return {name: table.detach().to(torch.float32).contiguous() for name, table in found.items()}
