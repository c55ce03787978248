"""The interfaces of the engines that run a reader, and which of their errors end the process.

`load.py` makes the engines that the manifest asks for: `cpu.py` runs on ONNX Runtime, `gpu/` on TensorRT or ONNX Runtime's CUDA provider.
The pipeline and the Triton models use these interfaces only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


def is_fatal(error: BaseException) -> bool:
    """Whether the process that got `error` from an engine or a packer must end.

    A CUDA error such as an illegal address is sticky: every later CUDA call of the process fails, and only a new process can go on. False
    for every other error, and always if no reader runs on a GPU. May be called from any thread.
    """
    device = sys.modules.get("serving.engines.gpu.device")  # not imported on a CPU: then nothing can be sticky
    return device is not None and bool(device.is_sticky(error))


class Encoder(Protocol):
    """Encodes passages, of several questions in one call."""

    def encode(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[Any]:
        """Compute the hidden states of each question.

        Args:
            batch: (input_ids, attention_mask) of each question, both int32[n_passages, passage_length]; a mask is 1 for valid tokens,
                which come first in their row.

        Returns:
            float[n_passages, passage_length, d_model] of each question, zero where the mask is: float32 in host memory, or float16 on the
            GPU.
        """
        ...


class Packer(Protocol):
    """Removes the padding from hidden states. Safe to share between threads."""

    def pack(self, states: Any, mask: np.ndarray) -> Any:
        """float[n_passages, passage_length, d_model] and int32[n_passages, passage_length] -> float[valid tokens, d_model]."""
        ...

    def concatenate(self, chunks: Sequence[Any]) -> Any:
        """The packed chunks of one question, in order -> float[encoder_sequence_length, d_model]."""
        ...


class Decoder(Protocol):
    """Decodes one token per step for the sequences in slots 0 to batch-1, and owns their caches. Called from one thread.

    Attributes:
        slots: sequences that can be decoded together.
        has_beams: whether it is a BeamDecoder as well.
        can_drop: whether it is a DroppingDecoder as well.
    """

    slots: int
    has_beams: bool
    can_drop: bool

    def admit(self, slot: int, running: int, hidden: Any, encoder_positions: np.ndarray) -> None:
        """Compute a question's cross-attention keys and values into a slot.

        Args:
            slot: a free one, at most `running`.
            running: slots in use, whose caches are kept. `slot` may be one of them if its sequence has ended.
            hidden: float[encoder_sequence_length, d_model] from the reader's packer.
            encoder_positions: int32[encoder_sequence_length], the position of each token in the padded sequence.

        Raises:
            EngineError: if the question does not fit into a slot.
        """

    def move(self, source: int, target: int) -> None:
        """Move the sequence in slot `source` to the slot `target`, whose sequence has ended."""

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for slots 0 to batch-1.

        Args:
            tokens: int32[batch], the last token of each sequence; the start token at position 0.
            positions: int32[batch], how many tokens each sequence has in its self-attention cache.
            eos_penalty: float32[batch], added to the end token's logit.

        Returns:
            int32[batch] next tokens, float32[batch] their log-probabilities, and float32[batch, at least each encoder_sequence_length]
            the cross-attention of each encoded token: defined for sequences at position 0, arbitrary for the others.

        Raises:
            EngineError: if a slot cannot hold another token.
        """
        ...


class DroppingDecoder(Decoder, Protocol):
    """A decoder that can go on with a part of a question's encoder tokens. Its cross-attention is defined at every position."""

    def keep(self, slot: int, running: int, kept: np.ndarray) -> None:
        """Drop all encoder tokens of a slot but some. Slots are as long as the longest running question: all shrink once that has.

        Args:
            slot: of the question.
            running: slots in use.
            kept: int[at least 1], indices into the tokens that the slot has, in ascending order.
        """
        ...


class BeamDecoder(Decoder, Protocol):
    """A decoder whose slots may hold several sequences of one question, which share its cross-attention keys and values."""

    def admit(self, slot: int, running: int, hidden: Any, encoder_positions: np.ndarray, beams: int = 1) -> None:
        """As Decoder.admit, for a question with `beams` sequences. All slots together have `Decoder.slots` sequences at most."""

    def beam_step(
        self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray, parents: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for the sequences of slots 0 to len(parents)-1.

        Args:
            tokens: int32[batch], the last token of each sequence, those of slot 0 first.
            positions: int32[batch], tokens that each sequence has in its self-attention cache; equal within a slot.
            eos_penalty: float32[batch], added to the end token's logit.
            parents: of each slot int[its sequences]: which of its sequences in the last step each sequence continues. A slot has one
                sequence at least and at most as many as it was admitted with, and their number may change from step to step.

        Returns:
            As Decoder.step, the cross-attention per slot, and float32[batch, vocab_size] logits, the penalty included. Valid until the
            next step.
        """
        ...
