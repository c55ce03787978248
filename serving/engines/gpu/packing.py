"""Removes padding from hidden states on a GPU, and joins the chunks of a question; see serving/engines/packing.py."""

from __future__ import annotations

from collections.abc import Sequence

import cupy as cp
import numpy as np


class GpuPacker:
    """Packs hidden states on the device that is current when it is made. Safe to share between threads."""

    def __init__(self) -> None:
        self._device = cp.cuda.Device()
        # One stream for all threads: CuPy's memory pool keeps freed memory per stream, and a new stream would begin with a cudaMalloc.
        self._stream = cp.cuda.Stream(non_blocking=True)

    def pack(self, states: object, mask: np.ndarray) -> cp.ndarray:
        """Pack the valid hidden states of some passages.

        Args:
            states: float16[n_passages, passage_length, d_model], on the GPU or in host memory.
            mask: int32[n_passages, passage_length], 1 = valid.

        Returns:
            float16[valid tokens, d_model] on the GPU; the copy is finished.
        """
        with self._device, self._stream:
            on_gpu = states if isinstance(states, cp.ndarray) else cp.asarray(states)
            packed = on_gpu.reshape(-1, on_gpu.shape[-1])[cp.asarray(np.flatnonzero(mask).astype(np.int32))]
            self._stream.synchronize()
        return packed

    def concatenate(self, chunks: Sequence[cp.ndarray]) -> cp.ndarray:
        """The packed chunks of one question, in order -> float16[encoder_sequence_length, d_model]; the copy is finished."""
        if len(chunks) == 1:
            return chunks[0]
        with self._device, self._stream:
            joined = cp.empty((sum(map(len, chunks)), chunks[0].shape[1]), cp.float16)
            start = 0
            for chunk in chunks:
                joined[start : start + len(chunk)] = chunk
                start += len(chunk)
            self._stream.synchronize()
        return joined
