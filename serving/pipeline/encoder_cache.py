"""Encoder states of passages, kept in memory: a passage that comes again with the same question is not encoded again.

An encoder sees one prompt at a time, a question with one passage, so that kept states are those of another request with the same prompt.
Comes in: token ids of prompts, and an encoder. Goes out: their states. The least recently used ones leave when the bytes are spent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from .answer_cache import ByteCache, CacheCounts

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


class EncoderStateCache:
    """Kept encoder states in host memory. Safe to share between threads.

    Args:
        max_bytes: of all kept states with their keys; 0 = nothing is kept, and nothing is looked up or counted.
        d_model: width of a state.
    """

    def __init__(self, max_bytes: int, d_model: int):
        self._max_bytes, self._d_model = max_bytes, d_model
        self._kept = ByteCache(max_bytes)

    def encode(self, input_ids: np.ndarray, attention_mask: np.ndarray, encode: Encode) -> np.ndarray:
        """The states of all prompts, packed; `encode` is called for those that are not kept, at once, if there are any.

        Args:
            input_ids: int32[n_passages, passage_length].
            attention_mask: int32[n_passages, passage_length].
            encode: the same two of some prompts -> float32[their valid tokens, d_model], packed in their order.

        Returns:
            float32[valid tokens, d_model].
        """
        if not self._max_bytes:
            return encode(input_ids, attention_mask)
        lengths = attention_mask.sum(1)
        keys = [hashlib.sha256(ids[:length].tobytes()).digest() for ids, length in zip(input_ids, lengths, strict=True)]
        found = {key: self._kept.get(key) for key in dict.fromkeys(keys)}
        missing = [row for row, key in enumerate(keys) if found[key] is None and key not in keys[:row]]
        states = {
            key: np.frombuffer(content, np.float32).reshape(-1, self._d_model) for key, content in found.items() if content is not None
        }
        if missing:
            encoded = encode(input_ids[missing], attention_mask[missing])
            for row, part in zip(missing, np.split(encoded, np.cumsum(lengths[missing])[:-1]), strict=True):
                states[keys[row]] = part
                self._kept.put(keys[row], part.tobytes())
        return np.concatenate([states[key] for key in keys])

    def counts(self) -> CacheCounts:
        """A copy of the counts: prompts looked up, and what is kept now."""
        return self._kept.counts()
