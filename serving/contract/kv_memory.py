"""How much memory a question's keys and values may take, and how many slots a budget affords. Arithmetic only."""

from __future__ import annotations

import dataclasses

from .limits import Limits, LimitsError
from .tensors import EngineSizes

SELF_LENGTH_START = 16  # tokens first reserved for an answer; doubled when it outgrows them


def cache_length(tokens: int, smallest: int = 64) -> int:
    """Length to reserve for `tokens`, in steps of 64 or of a quarter of the power of two below it: at most a quarter more than needed."""
    step = max(smallest, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def self_cache_length(tokens: int) -> int:
    """Length to reserve for an answer of `tokens`: the next power of two."""
    return max(SELF_LENGTH_START, 1 << (tokens - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class KVBudget:
    """Slots, and the bytes that the largest question the limits allow takes in one of them."""

    slots: int
    bytes_per_question: int

    def __str__(self) -> str:
        total = self.slots * self.bytes_per_question
        return f"{self.slots} slots, at most {self.bytes_per_question:,} bytes of keys and values a question, {total:,} in all"


def plan(sizes: EngineSizes, limits: Limits, passage_length: int, bytes_per_element: int) -> KVBudget:
    """Fit the slots into the budget.

    Raises:
        LimitsError: if not even one question fits.
    """
    cross = cache_length(limits.max_passages * passage_length) * sizes.cross_kv_bytes_per_token(bytes_per_element)
    own = self_cache_length(limits.max_new_tokens) * sizes.self_kv_bytes_per_token(bytes_per_element)
    needed = cross + own
    if not limits.kv_cache_bytes:
        return KVBudget(limits.slots, needed)
    if limits.kv_cache_bytes < needed:
        raise LimitsError(
            f"kv_cache_bytes: wanted at least {needed:,} for one question of {limits.max_passages} passages x {passage_length} tokens and "
            f"{limits.max_new_tokens} new tokens, got {limits.kv_cache_bytes:,}; raise it, or lower max_passages or max_new_tokens"
        )
    return KVBudget(min(limits.slots, limits.kv_cache_bytes // needed), needed)
