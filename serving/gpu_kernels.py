"""The CUDA kernels between the products of a reader, compiled for its sizes, and how each is launched.

The sources are in cuda/. All launches go to CuPy's current stream and may be captured into a graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy as cp

from .gpu_plan import TILE
from .products import StackSizes
from .tensors import EngineSizes

SOURCES = Path(__file__).with_name("cuda")
CHUNK = 256  # encoded tokens a block of cross-attention reads: enough blocks for all multiprocessors even for one question
WARPS = 4  # of an attention block
THREADS = 256  # of the blocks of `activate`


def splits_of(capacity: int) -> int:
    """Chunks that a cache of `capacity` tokens falls into."""
    return -(-capacity // CHUNK)


def keys_at_a_time(d_kv: int) -> int:
    """Keys that a stage of an attention block, or a warp of one, has in shared memory."""
    return 64 if d_kv <= 64 else 32


def _compiled(source: str, defines: dict[str, Any]) -> cp.RawModule:
    text = "".join((SOURCES / name).read_text(encoding="utf-8") for name in ("vectors.cuh", "tensor_cores.cuh", source))
    return cp.RawModule(code=text, options=("--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())))


class RowKernels:
    """What is done to rows of one stack.

    Shapes below: `residual` float32[rows, d_model], `normed` and `made` float16[rows, d_model], `weight` float32[d_model].
    """

    def __init__(self, stack: StackSizes):
        self.d_ff = stack.d_ff
        self._block = (-(-stack.d_model // 8 // 32) * 32,)  # a thread a vector of eight
        defines = {"D_MODEL": stack.d_model, "D_FF": stack.d_ff, "GATED": int(stack.gated), "EPSILON": f"{stack.epsilon!r}f"}
        module = _compiled("rows.cu", defines)
        self._embed, self._add_and_norm, self._activate = (module.get_function(n) for n in ("embed", "add_and_norm", "activate"))

    def embed(self, tokens: cp.ndarray, embedding: cp.ndarray, weight: cp.ndarray, residual: cp.ndarray, normed: cp.ndarray) -> None:
        """int32[rows] by float16[vocab_size, d_model] to the residual stream and its norm."""
        self._embed((len(tokens),), self._block, (tokens, embedding, weight, residual, normed))

    def add_and_norm(
        self, made: cp.ndarray, weight: cp.ndarray, residual: cp.ndarray, normed: cp.ndarray, destinations: cp.ndarray | None = None
    ) -> None:
        """Add `made` to the residual stream and norm it; with `destinations` int32[rows] into those rows of `normed`, at the very end."""
        address = cp.uint64(0) if destinations is None else destinations
        self._add_and_norm((len(made),), self._block, (made, weight, address, residual, normed))

    def activate(self, inner: cp.ndarray, out: cp.ndarray) -> None:
        """float16[rows, 2 * d_ff] (relu: d_ff) to float16[rows, d_ff]."""
        rows = len(inner)
        self._activate((-(-rows * self.d_ff // 8 // THREADS),), (THREADS,), (inner, cp.int32(rows), out))


class EncoderAttention:
    """Self-attention of tokens that lie passage after passage, for one reader's encoder."""

    def __init__(self, stack: StackSizes, reach: int):
        self._heads = stack.num_heads
        self._keys = keys_at_a_time(stack.d_kv)
        defines = {"D_KV": stack.d_kv, "HEADS": stack.num_heads, "REACH": reach, "WARPS": WARPS, "TILE": TILE, "KEYS": self._keys}
        module = _compiled("encoder_attention.cu", defines)
        self._attention = module.get_function("attention")

    def __call__(self, query_key_value: cp.ndarray, tiles: cp.ndarray, longest: int, bias: cp.ndarray, out: cp.ndarray) -> None:
        """Attend within each passage.

        Args:
            query_key_value: float16[tokens, 3 * num_heads * d_kv].
            tiles: of `attention_tiles`, on the GPU.
            longest: tokens of the longest passage.
            bias: float32[2 * reach + 1, num_heads], by key minus query.
            out: float16[tokens, num_heads * d_kv].
        """
        near = -(-longest // self._keys) * self._keys + TILE  # distances that a tile can need
        self._attention((len(tiles), self._heads), (WARPS * 32,), (query_key_value, tiles, bias, out), shared_mem=near * 4)


class StepKernels:
    """Attention over the caches of a decoder step, and the choice of the token, for one reader.

    Shapes below: `cache` float16[slots, capacity, 2 * num_kv_heads * d_kv], a token's keys of all heads and then its values; `slots`,
    `positions` and `lengths` int32[batch], a negative position marks an idle row; `bias` float32[reach + 1, num_heads] or None.
    """

    def __init__(self, sizes: EngineSizes, eos_token_id: int):
        self.sizes, self.eos_token_id = sizes, eos_token_id
        defines = {
            "D_KV": sizes.d_kv,
            "HEADS": sizes.num_heads,
            "KV_HEADS": sizes.num_kv_heads,
            "CHUNK": CHUNK,
            "VOCAB": sizes.vocab_size,
            "WARPS": WARPS,
            "WARP_TOKENS": keys_at_a_time(sizes.d_kv),
        }
        module = _compiled("decoder_step.cu", defines)
        self._self_attention = module.get_function("self_attention")
        self._cross_attention = module.get_function("cross_attention")
        self._shared_bytes = 0
        if sizes.num_kv_heads < sizes.num_heads:  # a warp's tokens, keys and values, each row eight halves apart from the next
            self._shared_bytes = WARPS * 2 * keys_at_a_time(sizes.d_kv) * (sizes.d_kv + 8) * 2
            self._cross_attention.max_dynamic_shared_size_bytes = self._shared_bytes
        self._cross_join = module.get_function("cross_join")
        self._evidence = module.get_function("evidence")
        self._pick_token = module.get_function("pick_token")

    def self_attention(
        self, query_key_value: cp.ndarray, cache: cp.ndarray, slots: cp.ndarray, positions: cp.ndarray, bias: cp.ndarray, out: cp.ndarray
    ) -> None:
        """Append each row's new key and value to its slot and attend to all up to it.

        Args:
            query_key_value: float16[batch, (num_heads + 2 * num_kv_heads) * d_kv].
            out: float16[batch, num_heads * d_kv].
        """
        grid = (self.sizes.num_heads, len(query_key_value))
        arguments = (query_key_value, cache, slots, positions, bias, cp.int32(len(bias) - 1), cp.int32(cache.shape[1]), out)
        self._self_attention(grid, (WARPS * 32,), arguments)

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
            partial: float32[batch, num_heads, splits, d_kv + 2], scratch.
            softmax: float32[batch, num_heads, 2], for `evidence`.
            out: float16[batch, num_heads * d_kv].
        """
        batch, heads, kv_heads, d_kv = len(query), self.sizes.num_heads, self.sizes.num_kv_heads, self.sizes.d_kv
        capacity, splits = cache.shape[1], partial.shape[2]
        reach = 0 if bias is None else len(bias) - 1
        grid = (splits, kv_heads * -(-heads // kv_heads // 16), batch)
        numbers = (cp.int32(reach), cp.int32(capacity), cp.int32(splits))
        address = cp.uint64(0) if bias is None else bias
        arguments = (query, cache, slots, lengths, positions, address, encoder_positions, *numbers, partial)
        self._cross_attention(grid, (WARPS * 32,), arguments, shared_mem=self._shared_bytes)
        join = (partial, lengths, cp.int32(splits), out, softmax)
        self._cross_join((heads, batch), (max(32, d_kv),), join, shared_mem=splits * 4)

    def evidence(
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
        reach = 0 if bias is None else len(bias) - 1
        share = cp.float32(1 / len(self.sizes.cross_attention_layers))
        numbers = (cp.int32(reach), cp.int32(cache.shape[1]))
        address = cp.uint64(0) if bias is None else bias
        grid = (splits_of(cache.shape[1]), len(query))
        arguments = (query, cache, slots, lengths, positions, address, encoder_positions, *numbers, softmax)
        self._evidence(grid, (WARPS * 32,), (*arguments, cp.int32(layer_index == 0), share, weights))

    def pick_token(self, logits: cp.ndarray, eos_penalty: cp.ndarray, token: cp.ndarray, log_prob: cp.ndarray) -> None:
        """Greedy choice: float32[batch, vocab_size] and float32[batch] -> int32[batch] and float32[batch]."""
        self._pick_token((len(logits),), (1024,), (logits, eos_penalty, cp.int32(self.eos_token_id), token, log_prob))
