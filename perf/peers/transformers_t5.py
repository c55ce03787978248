"""transformers' T5 as a FiD reader: our reader -> transformers' model with the same weights -> greedy answers of a batch of questions.

The encoder reads each passage by itself. The hidden states of a question's passages are concatenated, and transformers' `generate` decodes
from them. FiDO cannot run so: transformers' T5 has neither layer-sparse cross-attention nor multi-query attention. Nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import CompileConfig, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from export.checkpoint.config import ReaderConfig
from export.checkpoint.hugging_face import t5_faults, t5_from_reader
from export.model.reader import Reader

Passages: TypeAlias = tuple[Tensor, Tensor]  # input_ids and attention_mask (1 = attend), each int64[n_passages, passage_length]


class PeerError(ValueError):
    """A reader or a workload that the peer cannot run."""


def hugging_face_fid(reader: Reader) -> T5ForConditionalGeneration:
    """The same reader as a transformers model, fp32 in eval mode; it shares the reader's memory.

    Raises:
        PeerError: transformers' T5 cannot represent the reader; the message names every reason.
    """
    require_t5(reader.config)
    return t5_from_reader(reader)


def require_t5(config: ReaderConfig) -> None:
    """Raise PeerError unless transformers' T5 can represent the reader and `generate` can run it."""
    faults = t5_faults(config)
    encoder, decoder = config.encoder, config.decoder
    if decoder.num_layers > encoder.num_layers:  # `generate` sizes its cache by the encoder's layers
        faults.append(f"decoder.num_layers: wanted at most the encoder's {encoder.num_layers}, got {decoder.num_layers}")
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
