"""Removes padding from hidden states in host memory, and joins the chunks of a question.

Runs on the threads that call the encoder, never on the scheduler's. gpu/packing.py does the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class HostPacker:
    """Packs hidden states in host memory. Safe to share between threads."""

    @staticmethod
    def pack(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Pack the valid hidden states of some passages; padding is then neither stored nor attended to.

        Args:
            states: float32[n_passages, passage_length, d_model].
            mask: int32[n_passages, passage_length], 1 = valid.

        Returns:
            float32[valid tokens, d_model], a copy.
        """
        return states[mask.astype(bool)]

    @staticmethod
    def concatenate(chunks: Sequence[np.ndarray]) -> np.ndarray:
        """The packed chunks of one question, in order -> float32[encoder_sequence_length, d_model]."""
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
