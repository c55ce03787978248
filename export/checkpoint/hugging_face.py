"""A reader as transformers' T5, for comparisons: perf/ measures it, and `export compare` checks our module against it.

Comes in: a Reader. Goes out: a T5ForConditionalGeneration that shares its memory. Reads no checkpoint.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from export.errors import CheckpointError
from export.model.reader import Reader

from .config import ReaderConfig
from .weights import hf_name

T5_WIDTHS = ("d_model", "d_kv", "d_ff", "num_heads")  # T5Config has one value of each, for both stacks
T5_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
T5_REST = ("vocab_size", "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")


class NotT5Error(CheckpointError):
    """A reader that transformers' T5 cannot represent."""


def t5_faults(config: ReaderConfig) -> list[str]:
    """Everything in a reader for which transformers' T5 has no place, one line each."""
    encoder, decoder = config.encoder, config.decoder
    faults = []
    if config.encoder_decoder_attention_period != 1:
        faults.append(f"encoder_decoder_attention_period: wanted 1, got {config.encoder_decoder_attention_period}")
    if decoder.num_kv_heads != decoder.num_heads:
        faults.append(f"decoder.num_kv_heads: wanted num_heads={decoder.num_heads}, got {decoder.num_kv_heads}")
    for size in T5_WIDTHS:
        if getattr(encoder, size) != getattr(decoder, size):
            faults.append(f"decoder.{size}: wanted the encoder's {getattr(encoder, size)}, got {getattr(decoder, size)}")
    if config.cross_attention_relative_bias:
        faults.append("cross_attention_relative_bias: wanted none, which transformers dropped in 4.0, got one")
    return faults


def t5_from_reader(reader: Reader) -> T5ForConditionalGeneration:
    """The reader as a transformers model, in eval mode; it shares the memory of the reader's weights.

    Raises:
        NotT5Error: naming everything for which transformers' T5 has no place.
    """
    config = reader.config
    faults = t5_faults(config)
    if faults:
        raise NotT5Error("transformers' T5 cannot represent this reader:\n  " + "\n  ".join(faults))
    t5 = T5Config(
        **{name: getattr(config, name) for name in T5_TOKENS + T5_REST},
        **{name: getattr(config.encoder, name) for name in T5_WIDTHS},
        num_layers=config.encoder.num_layers,
        num_decoder_layers=config.decoder.num_layers,
        # transformers 5 ties the head of every T5; this flag only says whether the last hidden state is scaled before the head
        tie_word_embeddings=config.scale_decoder_outputs,
    )
    with torch.device("meta"):  # draws no random weights only to replace them
        model = T5ForConditionalGeneration(t5)
    # the head is assigned by hand: `shared` also has the tied names, and only `config` says whether the head is one of them
    weights = {hf_name(name): weight.detach() for name, weight in reader.state_dict().items()}
    head = weights.pop("lm_head.weight", None)
    result = model.load_state_dict(weights, strict=False, assign=True)
    for module in (model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head):
        module.weight = model.shared.weight
    if head is not None:
        model.lm_head.weight = nn.Parameter(head)
    empty = sorted(name for name, weight in model.named_parameters() if weight.is_meta)
    if empty or result.unexpected_keys:
        raise NotT5Error(
            f"transformers {transformers.__version__}: its T5 has other weights than ours; missing: {', '.join(empty) or 'none'}; "
            f"unknown to it: {', '.join(result.unexpected_keys) or 'none'}"
        )
    return model.requires_grad_(False).eval()
