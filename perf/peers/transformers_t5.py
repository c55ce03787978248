"""transformers' T5 as a FiD reader: our reader -> transformers' model with the same weights -> greedy answers of a batch of questions.

The encoder reads each passage by itself. The hidden states of a question's passages are concatenated, and transformers' `generate` decodes
from them. FiDO cannot run so: transformers' T5 has neither layer-sparse cross-attention nor multi-query attention. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers import CompileConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from export.checkpoint.config import ReaderConfig
from export.checkpoint.weights import hf_name
from export.model.reader import Reader

T5_WIDTHS = ("d_model", "d_kv", "d_ff", "num_heads")  # in T5Config once, for both stacks
T5_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
T5_REST = ("vocab_size", "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon")

Passages: TypeAlias = tuple[Tensor, Tensor]  # input_ids and attention_mask (1 = attend), each int64[n_passages, passage_length]


class PeerError(ValueError):
    """A reader or a workload that the peer cannot run."""


def hugging_face_fid(reader: Reader) -> T5ForConditionalGeneration:
    """The same reader as a transformers model, fp32 in eval mode; it shares the reader's memory.

    Raises:
        PeerError: transformers' T5 cannot represent the reader; the message names every reason.
    """
    config = reader.config
    require_t5(config)
    t5 = T5Config(
        **{name: getattr(config, name) for name in T5_TOKENS + T5_REST},
        **{name: getattr(config.encoder, name) for name in T5_WIDTHS},
        num_layers=config.encoder.num_layers,
        num_decoder_layers=config.decoder.num_layers,
        # transformers 5 ties the head of every T5; it reads this flag as `scale the last hidden state before the head`
        tie_word_embeddings=config.scale_decoder_outputs,
    )
    with torch.device("meta"):  # skips the random initialization: every weight is replaced below
        model = T5ForConditionalGeneration(t5)
    # The head is assigned separately: `load_state_dict` cannot tell a tied head from one of its own.
    weights = {hf_name(name): weight.detach() for name, weight in reader.state_dict().items()}
    head = weights.pop("lm_head.weight", None)
    found = model.load_state_dict(weights, strict=False, assign=True)
    for module in (model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head):
        module.weight = model.shared.weight
    if head is not None:
        model.lm_head.weight = nn.Parameter(head)
    empty = sorted(name for name, weight in model.named_parameters() if weight.is_meta)
    if empty or found.unexpected_keys:
        raise PeerError(
            f"transformers {transformers.__version__}: wanted T5 weights of our names; missing: {', '.join(empty) or 'none'}; "
            f"unexpected: {', '.join(found.unexpected_keys) or 'none'}"
        )
    return model.requires_grad_(False).eval()


def require_t5(config: ReaderConfig) -> None:
    """Raise PeerError unless transformers' T5 can represent the reader."""
    encoder, decoder = config.encoder, config.decoder
    faults = []
    if config.encoder_decoder_attention_period != 1:
        faults.append(f"encoder_decoder_attention_period: wanted 1, got {config.encoder_decoder_attention_period}")
    if decoder.num_kv_heads != decoder.num_heads:
        faults.append(f"decoder.num_kv_heads: wanted num_heads={decoder.num_heads}, got {decoder.num_kv_heads}")
    for size in T5_WIDTHS:
        if getattr(encoder, size) != getattr(decoder, size):
            faults.append(f"decoder.{size}: wanted the encoder's {getattr(encoder, size)}, got {getattr(decoder, size)}")
    if decoder.num_layers > encoder.num_layers:  # `generate` sizes its cache by the encoder's layers
        faults.append(f"decoder.num_layers: wanted at most the encoder's {encoder.num_layers}, got {decoder.num_layers}")
    if config.cross_attention_relative_bias:
        faults.append("cross_attention_relative_bias: wanted none (transformers dropped it in 4.0), got one")
    if faults:
        which = "FiDO" if config.kind == "fido" else "this FiD reader"
        raise PeerError(f"transformers' T5 cannot run {which}; measure a plain FiD reader instead:\n  " + "\n  ".join(faults))


def cast_as_from_pretrained(model: T5ForConditionalGeneration, dtype: torch.dtype, device: str) -> T5ForConditionalGeneration:
    """Cast the model in place as `from_pretrained(dtype=...)` does: in fp16 transformers keeps T5's `wo` in fp32."""
    fp32_modules = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, weight in model.named_parameters():  # yields a tied weight once, so it stays tied
        weight.data = weight.data.to(device, torch.float32 if fp32_modules & set(name.split(".")) else dtype)
    return model


class FusionPeer:
    """Greedy answers of a batch of questions by transformers' `generate`.

    Args:
        model: from `hugging_face_fid`, on any device, in any precision.
        compiled: compile the encoder, and let `generate` compile the decoder step with its static cache. Every new batch shape compiles
            again.
    """

    def __init__(self, model: T5ForConditionalGeneration, *, compiled: bool = False):
        self._model, self._encoder, self.compiled = model, model.encoder, compiled
        self._options: dict[str, Any] = {}
        if compiled:
            self._encoder = torch.compile(model.encoder)
            compile_config = CompileConfig()
            compile_config._compile_all_devices = True  # without it `generate` compiles on accelerators only
            self._options = {"cache_implementation": "static", "compile_config": compile_config}

    @torch.inference_mode()
    def answer(self, questions: Sequence[Passages], max_new_tokens: int, min_new_tokens: int = 0) -> list[list[int]]:
        """Token ids of each question's answer, with the end token; equal limits force that length on every answer.

        A batch runs until its last answer ends. transformers forbids the end token as token number `min_new_tokens`; `Reader.generate`
        allows it there.

        Args:
            questions: on the host; passage counts and lengths may differ.
            max_new_tokens: maximum number of tokens.
            min_new_tokens: minimum number of tokens before the end token.
        """
        hidden, mask = self._encode(questions)
        generated = self._model.generate(
            encoder_outputs=BaseModelOutput(hidden),
            attention_mask=mask,
            num_beams=1,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            **self._options,
        )
        eos = self._model.config.eos_token_id
        rows = generated[:, 1:].tolist()  # without the start token; shorter answers are followed by padding
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    def _encode(self, questions: Sequence[Passages]) -> tuple[Tensor, Tensor]:
        """Hidden states float[batch, encoder_sequence_length, d_model] and their mask, padded to the longest question."""
        device = self._model.device
        counts = [len(ids) for ids, _ in questions]
        length = max(ids.shape[1] for ids, _ in questions)
        ids = torch.full((sum(counts), length), self._model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        start = 0
        for question_ids, question_mask in questions:
            n, width = question_ids.shape
            ids[start : start + n, :width], mask[start : start + n, :width] = question_ids, question_mask
            start += n
        ids, mask = ids.to(device), mask.to(device)
        hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        # [passages of all questions, length, ...] -> [batch, max_passages * length, ...]; padding inside a passage stays there, masked
        fused_hidden = [one.flatten(0, 1) for one in hidden.split(counts)]
        fused_mask = [one.flatten() for one in mask.split(counts)]
        pad = nn.utils.rnn.pad_sequence
        return pad(fused_hidden, batch_first=True), pad(fused_mask, batch_first=True)
