"""The CUDA kernels between the gemms of a reader, compiled for its sizes, and how each is launched.

The sources are in cuda/. All launches go to CuPy's current stream and may be captured into a graph.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cupy as cp

from serving.contract.gemms import MAX_BLOCKS, MAX_SPLITS, StackSizes
from serving.contract.gpu_profiles import TILE
from serving.contract.tensors import EngineSizes

SOURCES = Path(__file__).with_name("cuda")
WARPS = 4  # of an attention block
# Encoded tokens that a block reads: of `attribution`, and of cross-attention where every head has keys of its own, elsewhere at least.
CHUNK = 256
# Where heads share keys, blocks of cross-attention that a card runs at once: three on a multiprocessor. Chunks are so long that
# there are no more, unless there are more rows.
SHARING_BLOCKS = 3 * MAX_BLOCKS
THREADS = 256  # of the blocks of `activate`
HEAD_WARPS, HEAD_ROWS, COMBINE_THREADS = 8, 48, 256  # of the blocks that choose the token
TOKENS_PER_WARP = 16  # whose logits a warp computes
# Of the blocks that multiply few rows. More tiles of rows would take more registers, and longer sums more shared memory, than two blocks
# have on a multiprocessor: the next block could not come up before this one has ended.
SKINNY_WARPS, SKINNY_COLUMNS, TILE_ROWS, MAX_TILES, MAX_K = 8, 32, 16, 3, 1024
K_TILE = 32  # by one of its warps, so that sums of other lengths are not its own
SUM_STRIDE = SKINNY_COLUMNS + 8  # of a row of its warps' sums in shared memory: rows eight banks apart


def split_k(array: cp.ndarray) -> int:
    """In how many k_splits a gemm makes or wants an array: [k_splits, rows, columns], or [rows, columns]."""
    return array.shape[0] if array.ndim == 3 else 1


def keys_at_a_time(d_kv: int) -> int:
    """Keys that a stage of an attention block, or a warp of one, has in shared memory."""
    return 64 if d_kv <= 64 else 32


def _compiled(defines: dict[str, Any], *sources: str) -> cp.RawModule:
    text = "".join((SOURCES / name).read_text(encoding="utf-8") for name in ("vectors.cuh", "tensor_cores.cuh", *sources))
    defines = {**defines, "MAX_SPLITS": MAX_SPLITS}
    return cp.RawModule(code=text, options=("--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())))


class RowKernels:
    """What is done to rows of one stack.

    Shapes below: `residual` float32[rows, d_model], `normed` and `made` float16[rows, d_model], `weight` float32[d_model]. What a gemm
    in k_splits makes is float16[k_splits, rows, columns], and what it wants float16[k_splits, rows, columns / k_splits].
    """

    def __init__(self, stack: StackSizes):
        self.d_ff = stack.d_ff
        self._block = (-(-stack.d_model // 8 // 32) * 32,)  # a thread a vector of eight
        defines = {"D_MODEL": stack.d_model, "D_FF": stack.d_ff, "GATED": int(stack.gated), "EPSILON": f"{stack.epsilon!r}f"}
        module = _compiled(defines, "rows.cu")
        self._embed, self._add_and_norm, self._activate = (module.get_function(n) for n in ("embed", "add_and_norm", "activate"))

    def embed(self, tokens: cp.ndarray, embedding: cp.ndarray, weight: cp.ndarray, residual: cp.ndarray, normed: cp.ndarray) -> None:
        """int32[rows] by float16[vocab_size, d_model] to the residual stream and its norm."""
        self._embed((len(tokens),), self._block, (tokens, embedding, weight, cp.int32(split_k(normed)), residual, normed))

    def add_and_norm(
        self, made: cp.ndarray, weight: cp.ndarray, residual: cp.ndarray, normed: cp.ndarray, destinations: cp.ndarray | None = None
    ) -> None:
        """Add `made` to the residual stream and norm it; with `destinations` int32[rows] into those rows of `normed`, at the very end."""
        address = cp.uint64(0) if destinations is None else destinations
        arguments = (made, cp.int32(split_k(made)), weight, address, cp.int32(split_k(normed)), residual, normed)
        self._add_and_norm((len(residual),), self._block, arguments)

    def activate(self, inner: cp.ndarray, out: cp.ndarray) -> None:
        """float16[rows, 2 * d_ff] (relu: d_ff) to float16[rows, d_ff]."""
        rows = len(inner)
        arguments = (inner, cp.int32(rows), cp.int32(split_k(out)), out)
        self._activate((-(-rows * self.d_ff // 8 // THREADS),), (THREADS,), arguments)


class SkinnyGemm:
    """Products of the few rows of a step, compiled for every 16 rows as they are needed."""

    def __init__(self) -> None:
        self._kernels: dict[int, Any] = {}

    def takes(self, x: cp.ndarray, weight: cp.ndarray) -> bool:
        """Whether it multiplies these; everything else is left to the engines."""
        given, made = weight.shape[-2:]
        rows, fits = x.shape[-2], given % K_TILE == 0 and given <= MAX_K and made % SKINNY_COLUMNS == 0
        return fits and rows <= TILE_ROWS * MAX_TILES and weight.dtype == cp.float16

    def multiply(self, x: cp.ndarray, weight: cp.ndarray, y: cp.ndarray) -> None:
        """Y = x @ weight, of every part, with sums in fp32; each row as if it were alone.

        Args:
            x: float16[rows, given], or [k_splits, rows, given].
            weight: float16[given, made], or [k_splits, given, made].
            y: float16[rows, made], or [k_splits, rows, made].
        """
        rows, (given, made) = x.shape[-2], weight.shape[-2:]
        tiles = -(-rows // TILE_ROWS)
        of_sums = SKINNY_WARPS * tiles * TILE_ROWS * SUM_STRIDE * 4
        grid, shared = (made // SKINNY_COLUMNS, split_k(x)), max(given * SKINNY_COLUMNS * 2, of_sums)
        arguments = (x, weight, cp.int32(rows), cp.int32(given), cp.int32(made), y)
        self._kernel(tiles)(grid, (SKINNY_WARPS * 32,), arguments, shared_mem=shared)

    def _kernel(self, tiles: int) -> Any:
        if tiles not in self._kernels:
            sizes = {"WARPS": SKINNY_WARPS, "COLUMNS": SKINNY_COLUMNS, "K_TILE": K_TILE, "SUM_STRIDE": SUM_STRIDE}
            module = _compiled({"TILES": tiles, **sizes}, "skinny_gemm.cu")
            self._kernels[tiles] = kernel = module.get_function("skinny_gemm")
            kernel.max_dynamic_shared_size_bytes = MAX_K * SKINNY_COLUMNS * 2
        return self._kernels[tiles]


class EncoderAttention:
    """Self-attention of tokens that lie passage after passage, for one reader's encoder."""

    def __init__(self, stack: StackSizes, max_relative_distance: int):
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
        module = _compiled(defines, "encoder_attention.cu")
        self._attention = module.get_function("attention")

    def __call__(self, query_key_value: cp.ndarray, tiles: cp.ndarray, longest: int, bias: cp.ndarray, out: cp.ndarray) -> None:
        """Attend within each passage.

        Args:
            query_key_value: float16[tokens, 3 * num_heads * d_kv].
            tiles: of `attention_tiles`, on the GPU.
            longest: tokens of the longest passage.
            bias: float32[2 * max_relative_distance + 1, num_heads], by key minus query.
            out: float16[tokens, num_heads * d_kv].
        """
        near = -(-longest // self._keys) * self._keys + TILE  # distances that a tile can need
        self._attention((len(tiles), self._heads), (WARPS * 32,), (query_key_value, tiles, bias, out), shared_mem=near * 4)


class StepKernels:
    """Attention over the caches of a decoder step, for one reader.

    Shapes below: `cache` float16[slots, capacity, 2 * num_kv_heads * d_kv], a token's keys of all heads and then its values; `slots`,
    `positions` and `lengths` int32[batch], a negative position marks an idle row; `bias` float32[max_relative_distance + 1, num_heads]
    or None. Arrays with split-K are as in RowKernels.
    """

    def __init__(self, sizes: EngineSizes):
        self.sizes = sizes
        self._shares = sizes.num_kv_heads < sizes.num_heads
        warp_tokens = keys_at_a_time(sizes.d_kv) // 2  # in each of two stages
        defines = {
            "D_KV": sizes.d_kv,
            "HEADS": sizes.num_heads,
            "KV_HEADS": sizes.num_kv_heads,
            "WARPS": WARPS,
            "WARP_TOKENS": warp_tokens,
            "ATTRIBUTION_TOKENS": CHUNK,
        }
        module = _compiled(defines, "step_attention.cuh", "self_attention.cu", "cross_attention.cu")
        self._self_attention = module.get_function("self_attention")
        self._cross_attention = module.get_function("cross_attention")
        self._round = WARPS * warp_tokens  # tokens that a block has at a time
        self._tiles = sizes.num_kv_heads * -(-sizes.num_heads // sizes.num_kv_heads // 16)  # blocks a chunk
        self._shared_bytes = 0
        if self._shares:  # two stages of a warp's tokens, keys and values, each row eight halves apart from the next
            self._shared_bytes = 2 * WARPS * 2 * warp_tokens * (sizes.d_kv + 8) * 2
            self._cross_attention.max_dynamic_shared_size_bytes = self._shared_bytes
        self._combine_split_kv = module.get_function("combine_split_kv")
        self._attribution = module.get_function("attribution")

    def max_splits(self, capacity: int) -> int:
        """Chunks that a cache of `capacity` tokens falls into at most."""
        return -(-capacity // CHUNK)

    def chunk_of(self, batch: int, capacity: int) -> int:
        """Encoded tokens that a block of cross-attention reads."""
        splits = max(SHARING_BLOCKS // (batch * self._tiles), 1) if self._shares else capacity
        return max(math.ceil(capacity / splits / self._round) * self._round, CHUNK)

    def self_attention(
        self, query_key_value: cp.ndarray, cache: cp.ndarray, slots: cp.ndarray, positions: cp.ndarray, bias: cp.ndarray, out: cp.ndarray
    ) -> None:
        """Append each row's new key and value to its slot and attend to all up to it.

        Args:
            query_key_value: float16[batch, (num_heads + 2 * num_kv_heads) * d_kv], may be made in k_splits.
            out: float16[batch, num_heads * d_kv], may be wanted in k_splits.
        """
        numbers = (cp.int32(len(bias) - 1), cp.int32(cache.shape[1]), cp.int32(split_k(out)))
        arguments = (query_key_value, cp.int32(split_k(query_key_value)), cache, slots, positions, bias, *numbers, out)
        self._self_attention((self.sizes.num_heads, len(positions)), (WARPS * 32,), arguments)

    def cross_attention(
        self,
        query: cp.ndarray,
        cache: cp.ndarray,
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
            encoder_positions: int32[slots, capacity], read only where there is a bias.
            partial: float32[batch * num_heads * max_splits * (d_kv + 2)], scratch.
            softmax: float32[batch, num_heads, 2], for `attribution`.
            out: float16[batch, num_heads * d_kv], may be wanted in k_splits.
        """
        batch, capacity = len(query), cache.shape[1]
        chunk = self.chunk_of(batch, capacity)
        splits = -(-capacity // chunk)
        max_relative_distance = 0 if bias is None else len(bias) - 1
        numbers = (cp.int32(max_relative_distance), cp.int32(capacity), cp.int32(chunk))
        address = cp.uint64(0) if bias is None else bias
        arguments = (query, cache, slots, lengths, positions, address, encoder_positions, *numbers, partial)
        self._cross_attention((splits, self._tiles, batch), (WARPS * 32,), arguments, shared_mem=self._shared_bytes)
        join = (partial, lengths, cp.int32(splits), cp.int32(chunk), cp.int32(split_k(out)), out, softmax)
        self._combine_split_kv((self.sizes.num_heads, batch), (max(32, self.sizes.d_kv),), join, shared_mem=splits * 4)

    def attribution(
        self,
        query: cp.ndarray,
        cache: cp.ndarray,
        slots: cp.ndarray,
        lengths: cp.ndarray,
        positions: cp.ndarray,
        bias: cp.ndarray | None,
        encoder_positions: cp.ndarray,
        softmax: cp.ndarray,
        layer_index: int,
        weights: cp.ndarray,
    ) -> None:
        """Add a layer's share of what each encoded token got from rows at their first token; call after `cross_attention`.

        Args:
            layer_index: of the cross-attending layers; 0 overwrites what is in `weights`.
            weights: float32[batch, capacity].
        """
        max_relative_distance = 0 if bias is None else len(bias) - 1
        share = cp.float32(1 / len(self.sizes.cross_attention_layers))
        numbers = (cp.int32(max_relative_distance), cp.int32(cache.shape[1]))
        address = cp.uint64(0) if bias is None else bias
        grid = (-(-cache.shape[1] // CHUNK), len(query))
        arguments = (query, cache, slots, lengths, positions, address, encoder_positions, *numbers, softmax)
        self._attribution(grid, (WARPS * 32,), (*arguments, cp.int32(layer_index == 0), share, weights))


class HeadKernels:
    """The choice of the token, for one reader."""

    def __init__(self, d_model: int, vocab_size: int, eos_token_id: int):
        self._eos_token_id = eos_token_id
        self._blocks = -(-vocab_size // (HEAD_WARPS * TOKENS_PER_WARP))
        sizes = {"HEAD_WARPS": HEAD_WARPS, "HEAD_ROWS": HEAD_ROWS, "COMBINE_THREADS": COMBINE_THREADS}
        module = _compiled({"D_MODEL": d_model, "VOCAB": vocab_size, **sizes}, "head.cu")
        self._head_argmax, self._combine_argmax = (module.get_function(n) for n in ("head_argmax", "combine_argmax"))

    def scratch(self, batch: int) -> cp.ndarray:
        """For so many rows or fewer: what the blocks find."""
        return cp.empty((self._blocks, batch, 3), cp.int32)

    def combine_argmax(
        self, hidden: cp.ndarray, head: cp.ndarray, eos_penalty: cp.ndarray, found: cp.ndarray, token: cp.ndarray, log_prob: cp.ndarray
    ) -> None:
        """Greedy choice; of equal logits the lowest id.

        Args:
            hidden: float16[batch, d_model].
            head: float16[vocab_size, d_model].
            eos_penalty: float32[batch], added to the end token's logit.
            found: `scratch` of this batch or a larger one.
            token: int32[batch], what is chosen.
            log_prob: float32[batch], of that.
        """
        batch = len(hidden)
        arguments = (hidden, head, eos_penalty, cp.int32(self._eos_token_id), cp.int32(batch), found)
        self._head_argmax((self._blocks, -(-batch // HEAD_ROWS)), (HEAD_WARPS * 32,), arguments)
        self._combine_argmax((batch,), (COMBINE_THREADS,), (found, cp.int32(self._blocks), token, log_prob))
