"""The encoder's self-attention on Hopper, for passages of up to 256 tokens and heads of 64; the source is cuda/hopper_attention.cu."""

from __future__ import annotations

import cupy as cp

from serving.contract.gemms import StackSizes

from .kernels import EncoderAttention, compiled
from .tensor_map import rows_behind, tensor_map

LONGEST, D_KV, TILE = 256, 64, 64  # what the kernel is made for, and queries or keys that it copies and computes at once
CAPABILITY, ARCHITECTURE = "90", "sm_90a"  # its instructions exist on no other cards, newer ones included
THREADS = 4 * 128 + 4 * 32  # four warpgroups that attend, four warps two of which copy
STAGE_BYTES, ONES_BYTES, BIAS_BYTES, BARRIER_BYTES = 3 * LONGEST * D_KV * 2, 16 * D_KV * 2, 1048 * 4, 48
SHARED_BYTES = 2 * STAGE_BYTES + ONES_BYTES + BIAS_BYTES + BARRIER_BYTES
ALIGNMENT = 1024  # of what the tensor cores read; shared memory starts anywhere


class HopperAttention:
    """What EncoderAttention does, for one reader's encoder, at the speed of the memory.

    Attributes:
        tile: queries of an entry of `attention_tiles`: here all of a passage.
    """

    tile = LONGEST

    def __init__(self, stack: StackSizes, reach: int, bfloat16: bool = False, fp8: bool = False):
        """Compile.

        Args:
            stack: sizes of the encoder.
            reach: of the bias.
            bfloat16: whether the halves that come in, and go out unless `fp8`, are bfloat16.
            fp8: whether e4m3 goes out.
        """
        self._heads = stack.num_heads
        self._steps = cp.cuda.Device().attributes["MultiProcessorCount"] // stack.num_heads  # passages that are worked on at once
        sizes = {"HEADS": stack.num_heads, "REACH": reach, "SHARED_BYTES": SHARED_BYTES}
        types = {"BF16": int(bfloat16), "FP8_OUT": int(fp8)}
        module = compiled({**sizes, **types}, "hopper.cuh", "hopper_attention.cu", architecture=ARCHITECTURE)
        self._attention = module.get_function("hopper_attention")
        self._attention.max_dynamic_shared_size_bytes = SHARED_BYTES + ALIGNMENT
        self._maps: dict[tuple[int, int], cp.ndarray] = {}  # of buffers, by address and rows; a captured call keeps its map's address

    @staticmethod
    def serves(stack: StackSizes, longest: int) -> bool:
        """Whether it can, on the current device: heads of this width, passages of so many tokens at most."""
        device = cp.cuda.Device()
        fits = stack.d_kv == D_KV and longest <= LONGEST and stack.num_heads <= device.attributes["MultiProcessorCount"]
        return fits and device.compute_capability == CAPABILITY

    def __call__(
        self, query_key_value: cp.ndarray, tiles: cp.ndarray, longest: int, bias: cp.ndarray, out: cp.ndarray, scale: float = 1.0
    ) -> None:
        """Attend within each passage. The first call for a buffer must not be captured.

        Args:
            query_key_value: halves[tokens, 3 * num_heads * d_kv].
            tiles: of `attention_tiles` for this class's `tile`, on the GPU; one of length 0 ends them.
            longest: tokens of the longest passage.
            bias: float32[2 * reach + 1, num_heads], by key minus query.
            out: halves[tokens, num_heads * d_kv], or as many bytes.
            scale: what is written is so many times the result, for e4m3 to cover its range.

        Raises:
            ValueError: for longer passages than it takes.
        """
        if longest > LONGEST:
            raise ValueError(f"passages of {longest} tokens, where at most {LONGEST} were expected")
        grid = self._heads * min(self._steps, len(tiles))
        arguments = (self._map_of(query_key_value), tiles, cp.int32(len(tiles)), bias, cp.float32(scale), out)
        self._attention((grid,), (THREADS,), arguments, shared_mem=SHARED_BYTES + ALIGNMENT)

    def _map_of(self, query_key_value: cp.ndarray) -> cp.ndarray:
        """The copy engine's map of a buffer, up to the end of its allocation: one for calls of all sizes."""
        buffer = query_key_value.data.ptr, rows_behind(query_key_value)
        if buffer not in self._maps:
            self._maps[buffer] = cp.asarray(tensor_map(*buffer, query_key_value.shape[1], TILE, D_KV))
        return self._maps[buffer]


def attention_for(stack: StackSizes, reach: int, longest: int) -> EncoderAttention | HopperAttention:
    """The fastest that serves passages of up to `longest` tokens on the current device."""
    return HopperAttention(stack, reach) if HopperAttention.serves(stack, longest) else EncoderAttention(stack, reach, longest)
