"""What serving asks of the engines that run a reader, whatever they run on.

`load.py` makes them by the manifest: `cpu.py` on ONNX Runtime, `gpu/` on TensorRT or ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


def is_fatal(error: BaseException) -> bool:
    """Whether the process that got `error` from an engine or a packer must end.

    A CUDA error such as an illegal address is sticky: every later CUDA call of the process fails, and nothing but a new process helps.
    False for every other error, and always where no reader runs on a GPU. May be called from any thread.
    """
    device = sys.modules.get("serving.engines.gpu.device")  # imported by what runs on a GPU, and by nothing else
    return device is not None and bool(device.is_sticky(error))


class Encoder(Protocol):
    """Passages of several questions in, hidden states out."""

    def encode(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[Any]:
        """Hidden states of each question.

        Args:
            batch: (input_ids, attention_mask) of each question, both int32[n_passages, passage_length].

        Returns:
            float[n_passages, passage_length, d_model] of each question: float32 on the host, or float16 on the GPU.
        """
        ...


class Packer(Protocol):
    """What happens to hidden states beside the encoder's call. Safe to share between threads."""

    def pack(self, states: Any, mask: np.ndarray) -> Any:
        """float[n_passages, passage_length, d_model] and int32[n_passages, passage_length] -> float[valid tokens, d_model]."""
        ...

    def concatenate(self, chunks: Sequence[Any]) -> Any:
        """Packed chunks of one question, in order -> float[encoder_sequence_length, d_model]."""
        ...


class Decoder(Protocol):
    """One token a step for the sequences in slots 0 to batch-1. Called from one thread.

    Attributes:
        slots: sequences that can be decoded together.
    """

    slots: int

    def admit(self, slot: int, running: int, hidden: Any, encoder_positions: np.ndarray) -> None:
        """Compute a question's cross-attention keys and values into a slot.

        Args:
            slot: free, at most `running`.
            running: slots in use, whose caches are kept.
            hidden: float[encoder_sequence_length, d_model] from the reader's packer.
            encoder_positions: int32[encoder_sequence_length].
        """

    def move(self, source: int, target: int) -> None:
        """Give the sequence in slot `source` the slot `target`."""

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for slots 0 to batch-1.

        Args:
            tokens: int32[batch], the last token of each sequence.
            positions: int32[batch], how many tokens each has generated.
            eos_penalty: float32[batch], added to the end token's logit.

        Returns:
            int32[batch] next tokens, float32[batch] their log-probabilities, and float32[batch, encoder_sequence_length] the
            cross-attention of each encoded token (of sequences at position 0; what the others hold is not defined).
        """
        ...
