"""Compiles the CUDA kernels between a reader's GEMMs for its sizes, and launches them.

The sources are in cuda/; sizes are compile-time constants there. All launches go to CuPy's current stream and may be captured into a CUDA
graph. None waits for the result, and none checks the values in its arrays.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cupy as cp

from serving.contract.call_sizes import TILE
from serving.contract.gemms import MAX_BLOCKS, MAX_SPLITS, StackSizes
from serving.contract.manifest import EngineError
from serving.contract.tensors import EngineSizes

SOURCES = Path(__file__).with_name("cuda")
WARPS = 4  # per block of the attention kernels
# Encoded tokens per block of `attribution`, and of cross-attention without shared keys; with shared keys (MQA, GQA) the minimum.
CHUNK = 256
# Blocks of cross-attention with shared keys that a GPU runs at once: three per multiprocessor. Chunks are long enough that there are no
# more blocks, unless there are more rows.
SHARED_KEY_BLOCKS = 3 * MAX_BLOCKS
THREADS = 256  # per block of `activate`
HEAD_WARPS, HEAD_ROWS, COMBINE_THREADS = 8, 48, 256  # per block of the LM head's kernels
TOKENS_PER_WARP = 16  # token ids whose logits a warp computes
# The skinny GEMM. Two of its blocks must fit on a multiprocessor, so that the next kernel's blocks can start early: more tiles of rows
# would need too many registers, a larger K too much shared memory.
SKINNY_WARPS, SKINNY_COLUMNS, TILE_ROWS, MAX_TILES, MAX_K = 8, 32, 16, 3, 1024
K_TILE = 32  # input features that one of its warps takes at a time: K must be a multiple
SUM_STRIDE = SKINNY_COLUMNS + 8  # floats of a row of a warp's sums in shared memory: neighbouring rows start eight banks apart


def split_k(array: cp.ndarray) -> int:
    """Number of splits of a GEMM's input or output: [k_splits, rows, columns], or [rows, columns] for 1."""
    return array.shape[0] if array.ndim == 3 else 1


def keys_at_a_time(d_kv: int) -> int:
    """Keys of one stage in the shared memory of the encoder's attention; twice those of a warp's stage in cross-attention."""
    return 64 if d_kv <= 64 else 32


def compiled(defines: dict[str, Any], *sources: str, architecture: str | None = None) -> cp.RawModule:
    """The kernels of these sources for the current device, or for an `architecture` of its generation that has more instructions."""
    text = "".join((SOURCES / name).read_text(encoding="utf-8") for name in ("vectors.cuh", "tensor_cores.cuh", *sources))
    defines = {**defines, "MAX_SPLITS": MAX_SPLITS}
    # CuPy adds the device's own architecture; of the two, NVRTC takes the one with more instructions
    options = () if architecture is None else (f"-arch={architecture}",)
    return cp.RawModule(code=text, options=("--std=c++17", *options, *(f"-D{name}={value}" for name, value in defines.items())))


class RowKernels:
    """Embedding, residual stream, norms and activation of one stack.

    Shapes below: `residual` float32[rows, d_model], `normed` and `y` float16[rows, d_model], `weight` float32[d_model]. The output of a
    split-K GEMM is float16[k_splits, rows, columns], its input float16[k_splits, rows, columns / k_splits].
    """

    def __init__(self, stack: StackSizes):
        self.d_ff = stack.d_ff
        self._block = (-(-stack.d_model // 8 // 32) * 32,)  # one thread per vector of eight
        defines = {"D_MODEL": stack.d_model, "D_FF": stack.d_ff, "GATED": int(stack.gated), "EPSILON": f"{stack.epsilon!r}f"}
        module = compiled(defines, "rows.cu")
        self._embed, self._add_and_norm, self._activate = (module.get_function(n) for n in ("embed", "add_and_norm", "activate"))

    def embed(self, tokens: cp.ndarray, embedding: cp.ndarray, weight: cp.ndarray, residual: cp.ndarray, normed: cp.ndarray) -> None:
        """Look up `tokens` int32[rows] in `embedding` float16[vocab_size, d_model]; write the residual stream and its norm."""
        self._embed((len(tokens),), self._block, (tokens, embedding, weight, cp.int32(split_k(normed)), residual, normed))

    def add_and_norm(
        self, y: cp.ndarray, weight: cp.ndarray, residual: cp.ndarray, normed: cp.ndarray, destinations: cp.ndarray | None = None
    ) -> None:
        """Add a GEMM's output `y` to the residual stream, and write its norm.

        With `destinations` int32[rows] the norm of row i goes to row destinations[i] of `normed`, and the residual stream is not written:
        for the last norm of a stack.
        """
        address = cp.uint64(0) if destinations is None else destinations
        arguments = (y, cp.int32(split_k(y)), weight, address, cp.int32(split_k(normed)), residual, normed)
        self._add_and_norm((len(residual),), self._block, arguments)

    def activate(self, inner: cp.ndarray, out: cp.ndarray) -> None:
        """`inner` float16[rows, 2 * d_ff] (with relu float16[rows, d_ff]) -> `out` float16[rows, d_ff]."""
        rows = len(inner)
        arguments = (inner, cp.int32(rows), cp.int32(split_k(out)), out)
        self._activate((-(-rows * self.d_ff // 8 // THREADS),), (THREADS,), arguments)


class SkinnyGemm:
    """GEMM of the few rows of a decoder step; compiled for 16, 32 or 48 rows when first needed."""

    def __init__(self) -> None:
        self._kernels: dict[int, Any] = {}

    def takes(self, x: cp.ndarray, weight: cp.ndarray) -> bool:
        """Whether this kernel can multiply these arrays; the engine does if not."""
        in_features, out_features = weight.shape[-2:]
        rows, fits = x.shape[-2], in_features % K_TILE == 0 and in_features <= MAX_K and out_features % SKINNY_COLUMNS == 0
        return fits and rows <= TILE_ROWS * MAX_TILES and weight.dtype == cp.float16

    def multiply(self, x: cp.ndarray, weight: cp.ndarray, y: cp.ndarray) -> None:
        """Y = x @ weight, of each split, with sums in fp32. The result of a row does not depend on the other rows.

        Args:
            x: float16[rows, in_features], or [k_splits, rows, in_features].
            weight: float16[in_features, out_features], or [k_splits, in_features, out_features].
            y: float16[rows, out_features], or [k_splits, rows, out_features].
        """
        rows, (in_features, out_features) = x.shape[-2], weight.shape[-2:]
        tiles = -(-rows // TILE_ROWS)
        sums_bytes = SKINNY_WARPS * tiles * TILE_ROWS * SUM_STRIDE * 4
        grid, shared = (out_features // SKINNY_COLUMNS, split_k(x)), max(in_features * SKINNY_COLUMNS * 2, sums_bytes)
        arguments = (x, weight, cp.int32(rows), cp.int32(in_features), cp.int32(out_features), y)
        self._kernel(tiles)(grid, (SKINNY_WARPS * 32,), arguments, shared_mem=shared)

    def _kernel(self, tiles: int) -> Any:
        if tiles not in self._kernels:
            sizes = {"WARPS": SKINNY_WARPS, "COLUMNS": SKINNY_COLUMNS, "K_TILE": K_TILE, "SUM_STRIDE": SUM_STRIDE}
            module = compiled({"TILES": tiles, **sizes}, "skinny_gemm.cu")
            self._kernels[tiles] = kernel = module.get_function("skinny_gemm")
            kernel.max_dynamic_shared_size_bytes = MAX_K * SKINNY_COLUMNS * 2
        return self._kernels[tiles]


class EncoderAttention:
    """Self-attention within passages whose tokens are packed, for one reader's encoder.

    Attributes:
        tile: queries of an entry of `attention_tiles`.

    Args:
        stack: of the encoder.
        max_relative_distance: the bias of keys that are further away is that of this distance.
        max_length: tokens of the longest passage of any call.

    Raises:
        EngineError: if this GPU has too little shared memory for such passages.
    """

    tile = TILE

    def __init__(self, stack: StackSizes, max_relative_distance: int, max_length: int):
        self._heads = stack.num_heads
        self._keys = keys_at_a_time(stack.d_kv)
        defines = {
            "D_KV": stack.d_kv,
            "HEADS": stack.num_heads,
            "MAX_RELATIVE_DISTANCE": max_relative_distance,
            "WARPS": WARPS,
            "TILE": TILE,
            "KEYS": self._keys,
        }
        module = compiled(defines, "encoder_attention.cu")
        self._attention = module.get_function("attention")
        self._reserve(max_length)

    def _reserve(self, max_length: int) -> None:
        """Allow the kernel the shared memory of the longest passage, which may exceed the default of 48 KB per block."""
        runtime = cp.cuda.runtime
        available = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, cp.cuda.Device().id)
        needed, static = self._shared_bytes(max_length), self._attention.shared_size_bytes
        if static + needed > available:
            longest = ((available - static) // 4 - TILE) // self._keys * self._keys
            raise EngineError(
                f"passage_length: wanted at most {longest}, for which this GPU has {available:,} bytes of shared memory per block, "
                f"got {max_length}; export the reader with shorter passages"
            )
        self._attention.max_dynamic_shared_size_bytes = needed

    def _shared_bytes(self, length: int) -> int:
        """Dynamic shared memory for the bias of all distances between a tile's queries and the keys of a passage, in fp32."""
        return (-(-length // self._keys) * self._keys + TILE) * 4

    def __call__(self, query_key_value: cp.ndarray, tiles: cp.ndarray, longest: int, bias: cp.ndarray, out: cp.ndarray) -> None:
        """Attend within each passage.

        Args:
            query_key_value: float16[tokens, 3 * num_heads * d_kv].
            tiles: int32[tiles, 3] of `attention_tiles`, on the GPU.
            longest: tokens of the longest passage of this call.
            bias: float32[2 * max_relative_distance + 1, num_heads]; row max_relative_distance + d is the bias of a key d tokens after the
                query.
            out: float16[tokens, num_heads * d_kv].
        """
        arguments = (query_key_value, tiles, bias, out)
        self._attention((len(tiles), self._heads), (WARPS * 32,), arguments, shared_mem=self._shared_bytes(longest))


class StepKernels:
    """Attention of a decoder step over the caches, for one reader.

    Shapes below: `cache` float16[slots, capacity, 2 * num_kv_heads * d_kv], a token's keys of all heads and then its values of all heads.
    `slots`, `positions` and `lengths` int32[batch]; a negative position marks an idle row. `bias` float32[max_relative_distance + 1,
    num_heads], row d for a key d tokens before the query, or None. Arrays of split-K GEMMs are as in RowKernels.

    With `cross_fp8` the cache of cross-attention is uint8[slots, 2, num_kv_heads, capacity, d_kv]: e4m3 of keys and values that were
    divided by `scales` float32[2, num_kv_heads]. Only a reader without shared keys can have it, on a GPU of compute capability 8.9 or
    later. Without it `scales` is None.
    """

    def __init__(self, sizes: EngineSizes, *, cross_fp8: bool = False):
        self.sizes = sizes
        self._shared_keys = sizes.num_kv_heads < sizes.num_heads
        warp_tokens = keys_at_a_time(sizes.d_kv) // 2  # per warp, in each of two stages
        defines = {
            "D_KV": sizes.d_kv,
            "HEADS": sizes.num_heads,
            "KV_HEADS": sizes.num_kv_heads,
            "WARPS": WARPS,
            "WARP_TOKENS": warp_tokens,
            "ATTRIBUTION_TOKENS": CHUNK,
            "CROSS_FP8": int(cross_fp8),
        }
        module = compiled(defines, "step_attention.cuh", "self_attention.cu", "cross_attention.cu")
        self._self_attention = module.get_function("self_attention")
        self._cross_attention = module.get_function("cross_attention")
        self._round = WARPS * warp_tokens  # tokens that a block processes at a time
        self._tiles = sizes.num_kv_heads * -(-sizes.num_heads // sizes.num_kv_heads // 16)  # blocks per chunk
        self._shared_bytes = 0
        if self._shared_keys:  # per warp two stages of keys and values, each row padded by eight halves against bank conflicts
            self._shared_bytes = 2 * WARPS * 2 * warp_tokens * (sizes.d_kv + 8) * 2
            self._cross_attention.max_dynamic_shared_size_bytes = self._shared_bytes
        self._combine_split_kv = module.get_function("combine_split_kv")
        self._attribution = module.get_function("attribution")
        self._quantize_cross_kv: Any = module.get_function("quantize_cross_kv") if cross_fp8 else None

    def max_splits(self, capacity: int) -> int:
        """Largest number of chunks of a cache of `capacity` tokens, for any batch."""
        return -(-capacity // CHUNK)

    def chunk_of(self, batch: int, capacity: int) -> int:
        """Encoded tokens per block of cross-attention."""
        splits = max(SHARED_KEY_BLOCKS // (batch * self._tiles), 1) if self._shared_keys else capacity
        return max(math.ceil(capacity / splits / self._round) * self._round, CHUNK)

    def self_attention(
        self, query_key_value: cp.ndarray, cache: cp.ndarray, slots: cp.ndarray, positions: cp.ndarray, bias: cp.ndarray, out: cp.ndarray
    ) -> None:
        """Write each row's new key and value at `positions` of its slot, and attend to all keys up to it.

        Args:
            query_key_value: float16[batch, (num_heads + 2 * num_kv_heads) * d_kv], possibly in splits.
            positions: each less than the cache's capacity.
            out: float16[batch, num_heads * d_kv], possibly in splits.
        """
        numbers = (cp.int32(len(bias) - 1), cp.int32(cache.shape[1]), cp.int32(split_k(out)))
        arguments = (query_key_value, cp.int32(split_k(query_key_value)), cache, slots, positions, bias, *numbers, out)
        self._self_attention((self.sizes.num_heads, len(positions)), (WARPS * 32,), arguments)

    def cross_attention(
        self,
        query: cp.ndarray,
        cache: cp.ndarray,
        scales: cp.ndarray | None,
        slots: cp.ndarray,
        lengths: cp.ndarray,
        positions: cp.ndarray,
        bias: cp.ndarray | None,
        encoder_positions: cp.ndarray,
        partial: cp.ndarray,
        softmax: cp.ndarray,
        out: cp.ndarray,
    ) -> None:
        """Attend to the first `lengths` tokens of each row's slot.

        Args:
            query: float16[batch, num_heads * d_kv].
            encoder_positions: int32[slots, capacity], read only if there is a bias.
            partial: float32[batch * num_heads * max_splits * (d_kv + 2)], scratch memory.
            softmax: float32[batch, num_heads, 2], written for `attribution`.
            out: float16[batch, num_heads * d_kv], possibly in splits.
        """
        batch, capacity = len(query), cache.shape[-2]
        chunk = self.chunk_of(batch, capacity)
        splits = -(-capacity // chunk)
        max_relative_distance = 0 if bias is None else len(bias) - 1
        numbers = (cp.int32(max_relative_distance), cp.int32(capacity), cp.int32(chunk))
        address, scales = (cp.uint64(0) if array is None else array for array in (bias, scales))
        arguments = (query, cache, scales, slots, lengths, positions, address, encoder_positions, *numbers, partial)
        self._cross_attention((splits, self._tiles, batch), (WARPS * 32,), arguments, shared_mem=self._shared_bytes)
        combine = (partial, scales, lengths, cp.int32(splits), cp.int32(chunk), cp.int32(split_k(out)), out, softmax)
        self._combine_split_kv((self.sizes.num_heads, batch), (max(32, self.sizes.d_kv),), combine, shared_mem=splits * 4)

    def attribution(
        self,
        query: cp.ndarray,
        cache: cp.ndarray,
        scales: cp.ndarray | None,
        slots: cp.ndarray,
        lengths: cp.ndarray,
        positions: cp.ndarray,
        bias: cp.ndarray | None,
        encoder_positions: cp.ndarray,
        softmax: cp.ndarray,
        layer_index: int,
        weights: cp.ndarray,
    ) -> None:
        """Add one layer's attention weights of each encoded token to `weights`, for rows at position 0; call after `cross_attention`.

        Args:
            layer_index: index among the layers with cross-attention; 0 overwrites `weights`.
            weights: float32[batch, capacity], summed over heads and averaged over layers.
        """
        max_relative_distance = 0 if bias is None else len(bias) - 1
        layer_weight = cp.float32(1 / len(self.sizes.cross_attention_layers))
        numbers = (cp.int32(max_relative_distance), cp.int32(cache.shape[-2]))
        address, scales = (cp.uint64(0) if array is None else array for array in (bias, scales))
        grid = (-(-cache.shape[-2] // CHUNK), len(query))
        arguments = (query, cache, scales, slots, lengths, positions, address, encoder_positions, *numbers, softmax)
        self._attribution(grid, (WARPS * 32,), (*arguments, cp.int32(layer_index == 0), layer_weight, weights))

    def quantize_cross_kv(self, source: cp.ndarray, scales: cp.ndarray, tokens: int, cache: cp.ndarray, row: int) -> None:
        """Round a question's keys and values to e4m3, in all layers with cross-attention; only with `cross_fp8`.

        Args:
            source: float16[layers, capacity, 2 * num_kv_heads * d_kv].
            scales: float32[layers, 2, num_kv_heads].
            tokens: of the question; rows behind them are not written.
            cache: uint8[layers, slots, 2, num_kv_heads, capacity, d_kv].
            row: the slot.
        """
        (layers, capacity, width), slots = source.shape, cache.shape[1]
        grid = (max(-(-tokens * width // 16 // (4 * THREADS)), 1), layers)
        arguments = (source, scales, cp.int32(tokens), cp.int32(capacity), cp.uint64(slots * capacity * width), cache[0, row])
        self._quantize_cross_kv(grid, (THREADS,), arguments)


class HeadKernels:
    """The LM head and the greedy choice of the token, for one reader."""

    def __init__(self, d_model: int, vocab_size: int, eos_token_id: int):
        self._eos_token_id = eos_token_id
        self._blocks = -(-vocab_size // (HEAD_WARPS * TOKENS_PER_WARP))
        sizes = {"HEAD_WARPS": HEAD_WARPS, "HEAD_ROWS": HEAD_ROWS, "COMBINE_THREADS": COMBINE_THREADS}
        module = compiled({"D_MODEL": d_model, "VOCAB": vocab_size, **sizes}, "head.cu")
        self._head_argmax, self._combine_argmax = (module.get_function(n) for n in ("head_argmax", "combine_argmax"))

    def scratch(self, batch: int) -> cp.ndarray:
        """Scratch memory for `batch` rows or fewer: int32[blocks, batch, 3]."""
        return cp.empty((self._blocks, batch, 3), cp.int32)

    def combine_argmax(
        self, hidden: cp.ndarray, head: cp.ndarray, eos_penalty: cp.ndarray, found: cp.ndarray, token: cp.ndarray, log_prob: cp.ndarray
    ) -> None:
        """Choose the token with the largest logit; of equal logits the lowest id.

        Args:
            hidden: float16[batch, d_model].
            head: float16[vocab_size, d_model].
            eos_penalty: float32[batch], added to the end token's logit.
            found: `scratch` of this batch or a larger one.
            token: int32[batch], written.
            log_prob: float32[batch], the token's log-probability, written.
        """
        batch = len(hidden)
        arguments = (hidden, head, eos_penalty, cp.int32(self._eos_token_id), cp.int32(batch), found)
        self._head_argmax((self._blocks, -(-batch // HEAD_ROWS)), (HEAD_WARPS * 32,), arguments)
        self._combine_argmax((batch,), (COMBINE_THREADS,), (found, cp.int32(self._blocks), token, log_prob))
