"""How the decoder step is cut for a GPU: into parts between its attentions, each a graph that knows no lengths.

A part is everything from one attention's output to the next attention's queries: projection, residual, norm, feed-forward. It sees one
row a running answer and nothing of the caches, so that an engine for it depends on the batch alone, and the keys and values, which are
what the decoder's time goes into, are read once, where they lie, by a kernel of their own (gpu_attention.py).

    tokens -> part 0 -> self-attention 0 -> part 1 -> [cross-attention 0 -> part 2 ->] self-attention 1 -> ... -> last part -> logits
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from .tensors import EngineSizes, GraphTensors, TensorSpec

AttentionKind = Literal["self", "cross"]


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of the decoder: which kind, in which layer (0-based over the whole decoder)."""

    kind: AttentionKind
    layer: int


@dataclasses.dataclass(frozen=True)
class StepPart:
    """One part of the decoder step.

    Attributes:
        name: of its engine file, without the suffix.
        after: the attention whose output it takes; None for the first part, which takes tokens.
        before: the attention whose queries it makes; None for the last part, which makes logits.
    """

    name: str
    after: AttentionSite | None
    before: AttentionSite | None


def attention_sites(sizes: EngineSizes) -> tuple[AttentionSite, ...]:
    """The decoder's attentions in the order in which a step runs them."""
    sites = []
    for layer in range(sizes.num_decoder_layers):
        sites.append(AttentionSite("self", layer))
        if layer in sizes.cross_attention_layers:
            sites.append(AttentionSite("cross", layer))
    return tuple(sites)


def step_parts(sizes: EngineSizes) -> tuple[StepPart, ...]:
    """The parts in order: one more than there are attentions."""
    sites = (None, *attention_sites(sizes), None)
    return tuple(StepPart(f"decoder_step.{i:02d}", sites[i], sites[i + 1]) for i in range(len(sites) - 1))


def step_part_tensors(sizes: EngineSizes, part: StepPart) -> GraphTensors:
    """Inputs and outputs of a part: one row a running answer, all fp32 but the tokens.

    `residual` is the residual stream. `attended` is what the attention before gave, its heads side by side. `query_key_value` holds the
    next self-attention's queries, then its new key, then its new value; `query` the next cross-attention's queries.
    """
    queries, keys = sizes.num_heads * sizes.d_kv, sizes.num_kv_heads * sizes.d_kv
    residual = ("batch", sizes.d_model_decoder)
    inputs: tuple[TensorSpec, ...]
    if part.after is None:
        inputs = (TensorSpec("decoder_input_ids", "int32", ("batch",)),)
    else:
        inputs = (TensorSpec("residual", "float32", residual), TensorSpec("attended", "float32", ("batch", queries)))
    if part.before is None:
        return GraphTensors(inputs, (TensorSpec("logits", "float32", ("batch", sizes.vocab_size)),))
    made = ("query_key_value", queries + 2 * keys) if part.before.kind == "self" else ("query", queries)
    return GraphTensors(inputs, (TensorSpec("new_residual", "float32", residual), TensorSpec(made[0], "float32", ("batch", made[1]))))


def packed_cross_kv_tensors(sizes: EngineSizes, dtype: str = "float16") -> GraphTensors:
    """The cross_kv graph of a GPU reader: a token's keys of all heads, then its values, side by side; one output a cross-attending layer.

    A question's output is then one block of memory and can be written straight into its slot.
    """
    return GraphTensors(
        (TensorSpec("encoder_hidden_states", dtype, ("encoder_sequence_length", sizes.d_model_encoder)),),
        tuple(
            TensorSpec(f"cross_kv.{layer}", dtype, ("encoder_sequence_length", 2 * sizes.num_kv_heads * sizes.d_kv))
            for layer in sizes.cross_attention_layers
        ),
    )
