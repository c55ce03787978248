"""Device and host memory of a reader: keys and values per slot, slots that a budget allows, all of a GPU decoder. Arithmetic only."""

from __future__ import annotations

import dataclasses

from .limits import Limits, LimitsError
from .tensors import EngineSizes

FP16_BYTES = 2
MIN_SELF_LENGTH = 16  # tokens that a self-attention cache is first reserved for; it doubles whenever a sequence outgrows it


def cache_length(tokens: int, min_step: int = 64) -> int:
    """Length to reserve for `tokens` encoded tokens.

    It is a multiple of a quarter of the largest power of two in `tokens`, or of `min_step` if that is more: caches of similar questions
    then have the same length, and at most a quarter is unused.
    """
    step = max(min_step, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def self_cache_length(tokens: int) -> int:
    """Length to reserve for `tokens` generated tokens: the next power of two, so that a growing cache is seldom copied."""
    return max(MIN_SELF_LENGTH, 1 << (tokens - 1).bit_length())


def cache_capacities(limits: Limits, passage_length: int) -> tuple[int, int]:
    """Tokens that one slot must hold: (encoded, generated)."""
    return cache_length(limits.max_passages * passage_length), self_cache_length(limits.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class KVBudget:
    """Slots, and the bytes of keys and values of the largest question that the limits allow."""

    slots: int
    bytes_per_question: int

    def __str__(self) -> str:
        total = self.slots * self.bytes_per_question
        return f"{self.slots} slots, at most {self.bytes_per_question:,} bytes of keys and values a question, {total:,} in all"


def plan(
    sizes: EngineSizes, limits: Limits, passage_length: int, bytes_per_element: int, cross_bytes_per_element: int | None = None
) -> KVBudget:
    """Choose the number of slots: as many as the limits ask for and `kv_cache_bytes` allows.

    Args:
        sizes: of the reader.
        limits: of a question, and of memory.
        passage_length: tokens of a passage at most.
        bytes_per_element: of a cached number.
        cross_bytes_per_element: of one that cross-attention reads; None for the same.

    Raises:
        LimitsError: if `kv_cache_bytes` does not allow even one slot.
    """
    encoded, generated = cache_capacities(limits, passage_length)
    of_cross = encoded * sizes.cross_kv_bytes_per_token(cross_bytes_per_element or bytes_per_element)
    needed = of_cross + generated * sizes.self_kv_bytes_per_token(bytes_per_element)
    if not limits.kv_cache_bytes:
        return KVBudget(limits.slots, needed)
    if limits.kv_cache_bytes < needed:
        raise LimitsError(
            f"kv_cache_bytes: wanted at least {needed:,} for one question of {limits.max_passages} passages x {passage_length} tokens and "
            f"{limits.max_new_tokens} new tokens, got {limits.kv_cache_bytes:,}; raise it, or lower max_passages or max_new_tokens"
        )
    return KVBudget(min(limits.slots, limits.kv_cache_bytes // needed), needed)


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """Bytes of device memory of a decoder, by purpose."""

    weights: int
    scratch: int
    cross_kv: int
    self_kv: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.scratch + self.cross_kv + self.self_kv

    def __str__(self) -> str:
        purposes = ", ".join(f"{field.name} {getattr(self, field.name) / 1e6:,.0f} MB" for field in dataclasses.fields(self))
        return f"{self.total / 1e6:,.0f} MB of GPU memory ({purposes})"


def decoder_memory(
    sizes: EngineSizes, slots: int, capacities: tuple[int, int], weights: int, scratch: int, cross_bytes: int = FP16_BYTES
) -> GpuMemory:
    """Device memory of a decoder.

    Args:
        sizes: of the reader.
        slots: sequences decoded together.
        capacities: of `cache_capacities`.
        weights: bytes of weights and engines.
        scratch: bytes of activations.
        cross_bytes: bytes of a number that cross-attention reads.
    """
    encoded, generated = capacities
    return GpuMemory(
        weights,
        scratch,
        slots * encoded * sizes.cross_kv_bytes_per_token(cross_bytes),
        slots * generated * sizes.self_kv_bytes_per_token(FP16_BYTES),
    )
