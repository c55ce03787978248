"""Shapes and memory of GPU engines: batch buckets, optimization profiles, and what a reader takes of the card. Arithmetic only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .kv_memory import cache_length, self_cache_length
from .limits import Limits
from .tensors import EngineSizes, GraphTensors

# An axis of an optimization profile: least, the length to be fastest at, most.
Range = tuple[int, int, int]
Shapes = tuple[tuple[int, ...], ...]
HALF_BYTES = 2
TILE = 64  # queries of a block of the encoder's attention
MIN_CAPTURED, CAPTURED_STEP, MAX_CAPTURED = (128, 256), 512, 10_240  # tokens of encoder calls that are captured
SKINNY_ROWS = 32  # rows of one tile of a gemm: up to so many running answers a gemm takes the same time


def batch_buckets(slots: int) -> tuple[int, ...]:
    """Batch sizes that a step is compiled for; a step of other size is filled up with idle rows to the next."""
    small = [size for size in (1, 2, 4, 8) if size < slots]
    return (*small, *range(16, slots, 8), slots)


def bucket_of(rows: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)


def encoder_batch(limits: Limits) -> int:
    """Passages of one encoder call at most: as many as the limits say, and at least those of the largest question."""
    return max(limits.encoder_batch, limits.max_passages)


def encoder_tokens(limits: Limits, passage_length: int) -> int:
    """Tokens of one encoder call at most."""
    return encoder_batch(limits) * passage_length


def captured_calls(most: int) -> tuple[int, ...]:
    """Tokens of the encoder's calls that are captured into CUDA graphs; a smaller call is filled up to the next.

    Larger ones keep the card busy for longer than their launches take.
    """
    return tuple(tokens for tokens in (*MIN_CAPTURED, *range(CAPTURED_STEP, MAX_CAPTURED + 1, CAPTURED_STEP)) if tokens <= most)


def max_tiles(tokens: int, passages: int) -> int:
    """Tiles of attention that so many tokens of at most so many passages fall into: the last one of a passage may hold a single token."""
    return tokens // TILE + min(tokens, passages)


def calls_of_tokens(lengths: np.ndarray, most: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Passages that lie one after the other, in calls of at most so many tokens; a passage is never cut.

    Args:
        lengths: int[passages], each at most `most`.
        most: tokens a call.

    Yields:
        The tokens of a call, counted over all passages, and the lengths of its passages.
    """
    ends = np.cumsum(lengths)
    passage, token = 0, 0
    while passage < len(lengths):
        until = int(np.searchsorted(ends, token + most, side="right"))
        yield slice(token, int(ends[until - 1])), lengths[passage:until]
        passage, token = until, int(ends[until - 1])


def attention_tiles(lengths: np.ndarray) -> np.ndarray:
    """The blocks of attention within passages that lie one after the other: one for every TILE tokens of a passage.

    Args:
        lengths: int[passages], all positive.

    Returns:
        int32[tiles, 3]: first token of the passage, its length, first query of the tile within the passage.
    """
    counts = -(-lengths // TILE)
    passage = np.repeat(np.arange(len(lengths)), counts)
    in_passage = np.arange(len(passage)) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = np.cumsum(lengths) - lengths
    return np.stack([firsts[passage], lengths[passage], in_passage * TILE], axis=1).astype(np.int32)


def profile_ranges(name: str, limits: Limits, passage_length: int) -> list[dict[str, Range]]:
    """Optimization profiles of an engine: axis name -> range, one dictionary a profile. Each is tuned for the largest that it serves."""
    if name == "encoder":  # the whole one, for Triton's own backend
        most = encoder_batch(limits)
        return [{"passages": (1, most, most), "passage_length": (1, passage_length, passage_length)}]
    if name.startswith("encoder."):
        tokens = encoder_tokens(limits, passage_length)
        return [{"tokens": (1, tokens, tokens)}]
    if name == "cross_kv":
        longest = limits.max_passages * passage_length
        return [{"encoder_sequence_length": (1, longest, longest)}]
    # of the decoder's gemms: what serves many rows is slower than it must be for few
    return [{"batch": (1, most, most)} for most in sorted({min(limits.slots, SKINNY_ROWS), limits.slots})]


def profile_shapes(tensors: GraphTensors, ranges: Mapping[str, Range]) -> dict[str, Shapes]:
    """Input name -> (min, opt, max) shapes."""
    return {spec.name: tuple(spec.shape({axis: span[i] for axis, span in ranges.items()}) for i in range(3)) for spec in tensors.inputs}


def fits(shape: Sequence[int], shapes: Shapes) -> bool:
    """Whether a shape lies within a profile's (min, opt, max)."""
    return all(least <= axis <= most for axis, least, most in zip(shape, shapes[0], shapes[2], strict=True))


def choose_profile(profiles: Sequence[Mapping[str, Shapes]], wanted: Mapping[str, Sequence[int]]) -> int | None:
    """Index of the tightest profile that all shapes fit, or None."""
    fitting = [i for i, profile in enumerate(profiles) if all(fits(shape, profile[name]) for name, shape in wanted.items())]
    return min(fitting, key=lambda i: sum(math.prod(shapes[2]) for shapes in profiles[i].values()), default=None)


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """Bytes of device memory that a decoder takes, by what for."""

    weights: int
    scratch: int
    cross_kv: int
    self_kv: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.scratch + self.cross_kv + self.self_kv

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / 1e6:,.0f} MB" for field in dataclasses.fields(self))
        return f"{self.total / 1e6:,.0f} MB of GPU memory ({parts})"


def cache_capacities(limits: Limits, passage_length: int) -> tuple[int, int]:
    """Tokens of a slot: encoded ones, and generated ones."""
    return cache_length(limits.max_passages * passage_length), self_cache_length(limits.max_new_tokens)


def decoder_memory(sizes: EngineSizes, slots: int, capacities: tuple[int, int], weights: int, scratch: int) -> GpuMemory:
    """What a decoder with so many slots takes."""
    encoded, generated = capacities
    return GpuMemory(
        weights,
        scratch,
        slots * encoded * sizes.cross_kv_bytes_per_token(HALF_BYTES),
        slots * generated * sizes.self_kv_bytes_per_token(HALF_BYTES),
    )
