"""The CUDA kernels between the engines of a decoder step, compiled for one reader, and how each is launched.

The source is cuda/decoder_step.cu. All launches go to CuPy's current stream and may be captured into a graph.
"""

from __future__ import annotations

from pathlib import Path

import cupy as cp

from .tensors import EngineSizes

SOURCE = Path(__file__).with_name("cuda") / "decoder_step.cu"
CHUNK = 256  # encoded tokens a block of cross-attention reads: enough blocks for all multiprocessors even for one question
WARPS = 4
QUERIES = 4  # as in the source


def splits_of(capacity: int) -> int:
    """Chunks that a cache of `capacity` tokens falls into."""
    return -(-capacity // CHUNK)


class StepKernels:
    """The kernels for one reader's sizes.

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
        }
        options = ("--std=c++17", *(f"-D{name}={value}" for name, value in defines.items()))
        module = cp.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=options)
        self._self_attention = module.get_function("self_attention")
        self._cross_attention = module.get_function("cross_attention")
        self._cross_join = module.get_function("cross_join")
        self._evidence = module.get_function("evidence")
        self._pick_token = module.get_function("pick_token")

    def self_attention(
        self, query_key_value: cp.ndarray, cache: cp.ndarray, slots: cp.ndarray, positions: cp.ndarray, bias: cp.ndarray, out: cp.ndarray
    ) -> None:
        """Append each row's new key and value to its slot and attend to all up to it.

        Args:
            query_key_value: float32[batch, (num_heads + 2 * num_kv_heads) * d_kv].
            out: float32[batch, num_heads * d_kv].
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
            query: float32[batch, num_heads * d_kv].
            encoder_positions: int32[slots, capacity], read only where there is a bias.
            partial: float32[batch, num_heads, splits, d_kv + 2], scratch.
            softmax: float32[batch, num_heads, 2], for `evidence`.
            out: float32[batch, num_heads * d_kv].
        """
        batch, heads, kv_heads = len(query), self.sizes.num_heads, self.sizes.num_kv_heads
        group = heads // kv_heads
        capacity, splits = cache.shape[1], partial.shape[2]
        reach = 0 if bias is None else len(bias) - 1
        grid = (splits, kv_heads * -(-group // min(group, QUERIES)), batch)
        numbers = (cp.int32(reach), cp.int32(capacity), cp.int32(splits))
        address = cp.uint64(0) if bias is None else bias
        self._cross_attention(grid, (WARPS * 32,), (query, cache, slots, lengths, positions, address, encoder_positions, *numbers, partial))
        self._cross_join((heads, batch), (max(32, self.sizes.d_kv),), (partial, lengths, cp.int32(splits), out, softmax))

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
