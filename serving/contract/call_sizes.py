"""How large one engine call on a GPU is: batch buckets of a step, encoder calls, tiles of attention. Encoder calls at a time on a CPU.

Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .limits import Limits

TILE = 64  # queries of one thread block of the encoder's attention
# Tokens of the encoder calls that are captured into CUDA graphs: MIN_CAPTURED, then every multiple of CAPTURED_STEP up to MAX_CAPTURED.
MIN_CAPTURED, CAPTURED_STEP, MAX_CAPTURED = (128, 256), 512, 10_240


def batch_buckets(slots: int) -> tuple[int, ...]:
    """Batch sizes for which a decoder step is prepared. A step of another size is padded with idle rows to the next bucket."""
    small = [size for size in (1, 2, 4, 8) if size < slots]
    return (*small, *range(16, slots, 8), slots)


def bucket_of(rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)


def lanes_of(threads: int) -> int:
    """Calls of an encoder on the CPU that run at the same time on so many threads.

    More than four would leave a question of few passages alone with one of many threads.
    """
    return 1 if threads < 2 else 2 if threads < 8 else 4


def encoder_batch(limits: Limits) -> int:
    """Largest number of passages per encoder call: the limit, but at least the passages of the largest question."""
    return max(limits.encoder_batch, limits.max_passages)


def encoder_tokens(limits: Limits, passage_length: int) -> int:
    """Largest number of tokens per encoder call."""
    return encoder_batch(limits) * passage_length


def captured_calls(max_tokens: int) -> tuple[int, ...]:
    """Sizes in tokens of the encoder calls that are captured into CUDA graphs, up to `max_tokens`.

    A call is padded to the next size. Calls of more than MAX_CAPTURED tokens are not captured: they keep the GPU busy for longer than
    their kernel launches take.
    """
    return tuple(tokens for tokens in (*MIN_CAPTURED, *range(CAPTURED_STEP, MAX_CAPTURED + 1, CAPTURED_STEP)) if tokens <= max_tokens)


def max_tiles(tokens: int, passages: int, tile: int = TILE) -> int:
    """Largest number of attention tiles of `tokens` tokens in at most `passages` passages: each passage's last tile may hold one token."""
    return tokens // tile + min(tokens, passages)


def calls_of_tokens(lengths: np.ndarray, max_tokens: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Split packed passages into calls of at most `max_tokens` tokens; a passage is never split.

    Args:
        lengths: int[passages], tokens of each passage, each at most `max_tokens`.
        max_tokens: tokens per call.

    Yields:
        For each call, its tokens as a slice of all packed tokens, and the lengths of its passages.
    """
    ends = np.cumsum(lengths)
    passage, token = 0, 0
    while passage < len(lengths):
        next_passage = int(np.searchsorted(ends, token + max_tokens, side="right"))
        yield slice(token, int(ends[next_passage - 1])), lengths[passage:next_passage]
        passage, token = next_passage, int(ends[next_passage - 1])


def attention_tiles(lengths: np.ndarray, tile: int = TILE) -> np.ndarray:
    """The tiles of attention within packed passages: one for every `tile` tokens of a passage.

    Args:
        lengths: int[passages], all positive.
        tile: tokens per tile.

    Returns:
        int32[tiles, 3]: the passage's first token among the packed ones, the passage's length, the tile's first query within the passage.
        For example, lengths (3, 100) give (0, 3, 0), (3, 100, 0) and (3, 100, 64).
    """
    counts = -(-lengths // tile)
    passage = np.repeat(np.arange(len(lengths)), counts)
    tile_in_passage = np.arange(len(passage)) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = np.cumsum(lengths) - lengths
    return np.stack([firsts[passage], lengths[passage], tile_in_passage * tile], axis=1).astype(np.int32)
