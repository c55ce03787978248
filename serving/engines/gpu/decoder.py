"""The decoder on a GPU: GEMMs with kernels between them, caches in fixed slots, one CUDA graph per step.

In: the engines cross_kv and those of the decoder's GEMMs, their weights. Out: a `Decoder` (engines/base.py). All of its work goes to one
stream: a step costs the host one graph launch and one wait. Each batch bucket has two graphs: one for steps in which a sequence is at
position 0, which also computes the passage attribution, and one for all other steps. Which sequence is in which slot is the scheduler's
decision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import cupy as cp
import cupyx
import numpy as np

from serving.contract.call_sizes import batch_buckets, bucket_of
from serving.contract.gemms import (
    BIAS,
    CROSS_BIAS,
    CROSS_KV_SCALES,
    EMBEDDING,
    HEAD,
    NORMS,
    array_file,
    decoder_gemms,
    packed_cross_kv_tensors,
    split_k_of,
)
from serving.contract.kv_memory import FP16_BYTES, GpuMemory, decoder_memory
from serving.contract.manifest import FLOAT8, FP8_CAPABILITY, EngineError, Manifest

from .cuda_graph import CudaGraph
from .engine import LoadEngine, Scratch
from .kernels import HeadKernels, RowKernels, SkinnyGemm, StepKernels
from .weights import load_arrays, load_gemms, weight_bytes

TOKENS, POSITIONS, SLOTS, LENGTHS, PENALTY = range(5)  # rows of the state that each step uploads
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind


class GpuDecoder:
    """The cross_kv engine and the GEMMs of a step, with their caches.

    Args:
        directory: of the engines.
        manifest: of the engines.
        load: loads an engine by its name.
        slots: sequences that can be decoded together.
        capacities: (encoded, generated) tokens that a slot can hold.

    Attributes:
        memory: device memory of all of it.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if the decoder is one graph, an engine or FP8 cannot run here, or the memory does not suffice.
    """

    has_beams = can_drop = False

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, slots: int, capacities: tuple[int, int]):
        sizes = self.sizes = manifest.sizes
        stack = manifest.decoder
        if stack is None:
            raise EngineError(f"{directory}: the decoder is one graph, but the GPU runs GEMMs; `make export` makes it again")
        self._stack = stack
        self.slots = slots
        self._encoded, self._generated = capacities
        self._device = cp.cuda.Device()  # of the thread that loads; the scheduler's thread enters it for each call
        self._stream = cp.cuda.Stream(non_blocking=True)
        with self._stream:
            scratch = Scratch()
            self._cross_kv = load("cross_kv", packed_cross_kv_tensors(sizes), scratch)
            self._gemms = load_gemms(directory, manifest, stack, decoder_gemms(sizes), load, scratch, SkinnyGemm())
            names = [EMBEDDING, NORMS, BIAS, HEAD] + [CROSS_BIAS] * (array_file("decoder", CROSS_BIAS) in manifest.files)
            arrays = load_arrays(directory, manifest, "decoder", names)
            self._embedding, self._norms, self._self_bias, self._head = arrays[:4]
            self._cross_bias = arrays[4] if len(arrays) > 4 else None
            weights = weight_bytes(self._gemms) + self._cross_kv.weight_bytes + sum(array.nbytes for array in arrays)
            self._cross_fp8 = manifest.cross_kv_precision == FLOAT8
            if self._cross_fp8:
                _require_fp8(directory, self._device)
                (self._cross_scales,) = load_arrays(directory, manifest, "decoder", [CROSS_KV_SCALES])
            self._rows, self._kernels = RowKernels(stack), StepKernels(sizes, cross_fp8=self._cross_fp8)
            self._head_kernels = HeadKernels(sizes.d_model_decoder, sizes.vocab_size, manifest.eos_token_id)
            activations = self._allocate_activations()
            cross_bytes = 1 if self._cross_fp8 else FP16_BYTES
            self.memory = decoder_memory(sizes, slots, capacities, weights, scratch.bytes + activations, cross_bytes)
            require_free(self.memory, slots, allocated=weights + activations)
            self._allocate_caches()
            self._buckets = batch_buckets(slots)
            variants = [(bucket, first) for bucket in self._buckets for first in (False, True)]
            self._steps = {variant: self._prepare(*variant) for variant in variants}
            self._stream.synchronize()

    def _allocate_activations(self) -> int:
        """Allocate the buffers of a step; returns their bytes.

        All graphs share them, as one runs at a time. Within a step a buffer is reused once its content is no longer needed.
        """
        sizes, slots = self.sizes, self.slots
        widest = max(split_k_of(self._stack, gemm) * loaded.weight.shape[-1] for gemm, loaded in self._gemms.items())
        self._residual = cp.empty((slots, sizes.d_model_decoder), cp.float32)
        self._normed = cp.empty((slots, sizes.d_model_decoder), cp.float16)
        self._attended = cp.empty((slots, sizes.num_heads * sizes.d_kv), cp.float16)
        self._activated = cp.empty((slots, self._stack.d_ff), cp.float16)
        self._gemm_output = cp.empty(slots * widest, cp.float16)
        self._partial = cp.empty((slots, sizes.num_heads, self._kernels.max_splits(self._encoded), sizes.d_kv + 2), cp.float32)
        self._softmax = cp.empty((slots, sizes.num_heads, 2), cp.float32)
        self._attribution = cp.zeros((slots, self._encoded), cp.float32)
        self._argmax_scratch = self._head_kernels.scratch(slots)
        width = 2 * sizes.num_kv_heads * sizes.d_kv
        # of one question, before they are rounded to FP8
        self._half_cross_kv = cp.empty((len(sizes.cross_attention_layers) * self._cross_fp8, self._encoded, width), cp.float16)
        buffers = (
            self._half_cross_kv,
            self._residual,
            self._normed,
            self._attended,
            self._activated,
            self._gemm_output,
            self._partial,
            self._softmax,
            self._attribution,
        )
        return sum(buffer.nbytes for buffer in buffers)

    def _allocate_caches(self) -> None:
        sizes, slots = self.sizes, self.slots
        width = 2 * sizes.num_kv_heads * sizes.d_kv
        # zeros, although kernels never read masked or unwritten tokens: a dump of a cache then shows no stray NaN
        self._self_cache = {i: cp.zeros((slots, self._generated, width), cp.float16) for i in range(sizes.num_decoder_layers)}
        layers = sizes.cross_attention_layers
        shape = (2, sizes.num_kv_heads, self._encoded, sizes.d_kv) if self._cross_fp8 else (self._encoded, width)
        self._cross_caches = cp.zeros((len(layers), slots, *shape), cp.uint8 if self._cross_fp8 else cp.float16)
        self._cross_cache = dict(zip(layers, self._cross_caches, strict=True))
        self._encoder_positions = cp.zeros((slots, self._encoded if self._cross_bias is not None else 1), cp.int32)
        self._state = cp.zeros((5, slots), cp.int32)
        self._host_state = cupyx.zeros_pinned((5, slots), np.int32)
        self._result = cp.zeros((2, slots), cp.int32)  # tokens, and the bits of their log-probabilities
        self._host_result = cupyx.zeros_pinned((2, slots), np.int32)
        self._cache_rows = list(range(slots))  # the scheduler's slot -> row of the caches: `move` swaps rows and copies nothing
        self._lengths = [0] * slots  # encoded tokens in each row of the caches
        self._programs: list[object] = []
        self._pending_hidden: list[cp.ndarray] = []  # hidden states that the stream may not have read yet

    def _prepare(self, bucket: int, first: bool) -> Callable[[], None]:
        """Run a step of `bucket` rows once, and capture it into a CUDA graph if every engine can be captured."""
        program = self._program(bucket, first)
        self._programs.append(program)  # a CUDA graph holds addresses only: the arrays must live as long as it does
        self._host_state[:] = 0
        self._host_state[POSITIONS] = -1

        def run() -> None:
            stream, copy = self._stream.ptr, cp.cuda.runtime.memcpyAsync
            copy(self._state.data.ptr, self._host_state.ctypes.data, self._state.nbytes, HOST_TO_DEVICE, stream)
            for operation in program:
                operation()
            copy(self._host_result.ctypes.data, self._result.data.ptr, self._result.nbytes, DEVICE_TO_HOST, stream)

        run()
        self._stream.synchronize()
        if not all(gemm.engine.capturable for gemm in self._gemms.values()):
            return run
        graph = CudaGraph(self._stream, run)
        return lambda: graph.launch(self._stream)

    def _program(self, bucket: int, first: bool) -> list[Callable[[], None]]:
        """The operations of a step of `bucket` rows, in the order in which to enqueue them.

        `first`: some row is at position 0, so the step also computes the passage attribution.
        """
        rows, kernels, sizes = self._rows, self._kernels, self.sizes
        positions, slots, lengths = (self._state[i, :bucket] for i in (POSITIONS, SLOTS, LENGTHS))
        residual, normed, activated = self._residual[:bucket], self._normed[:bucket], self._activated[:bucket]
        attended, partial, softmax = self._attended[:bucket], self._partial[:bucket], self._softmax[:bucket]
        norms, gemms = iter(self._norms), list(self._gemms)
        k_splits = [split_k_of(self._stack, gemm) for gemm in gemms] + [1]  # the LM head's kernel is not split
        x = _as_splits(normed, k_splits[0])  # the input of the next GEMM
        tokens = self._state[TOKENS, :bucket]
        program: list[Callable[[], None]] = [functools.partial(rows.embed, tokens, self._embedding, next(norms), residual, x)]
        for gemm, own, next_splits in zip(gemms, k_splits, k_splits[1:], strict=False):
            loaded = self._gemms[gemm]
            width = loaded.weight.shape[-1]
            y = self._gemm_output[: own * bucket * width].reshape((own, bucket, width) if own > 1 else (bucket, width))
            program.append(functools.partial(loaded.enqueue, x, y, self._stream, context=bucket))
            if gemm.kind == "qkv":
                x, cache = _as_splits(attended, next_splits), self._self_cache[gemm.layer]
                program.append(functools.partial(kernels.self_attention, y, cache, slots, positions, self._self_bias, x))
            elif gemm.kind == "cross_q":
                x, cache = _as_splits(attended, next_splits), self._cross_cache[gemm.layer]
                scales = self._cross_scales[sizes.cross_attention_layers.index(gemm.layer)] if self._cross_fp8 else None
                inputs = (y, cache, scales, slots, lengths, positions, self._cross_bias, self._encoder_positions)
                program.append(functools.partial(kernels.cross_attention, *inputs, partial, softmax, x))
                if first:
                    layer_index = sizes.cross_attention_layers.index(gemm.layer)
                    program.append(functools.partial(kernels.attribution, *inputs, softmax, layer_index, self._attribution[:bucket]))
            elif gemm.kind == "wi":
                x = _as_splits(activated, next_splits)
                program.append(functools.partial(rows.activate, y, x))
            else:
                x = _as_splits(normed, next_splits)
                program.append(functools.partial(rows.add_and_norm, y, next(norms), residual, x))
        penalty, log_prob = self._state[PENALTY, :bucket].view(cp.float32), self._result[1].view(cp.float32)
        outputs = (self._argmax_scratch, self._result[0], log_prob)
        program.append(functools.partial(self._head_kernels.combine_argmax, x, self._head, penalty, *outputs))
        return program

    def reserved_bytes(self) -> int:
        """Bytes of the caches."""
        return self.memory.cross_kv + self.memory.self_kv

    def admit(self, slot: int, running: int, hidden: cp.ndarray, encoder_positions: np.ndarray) -> None:
        """Enqueue the computation of a question's cross-attention keys and values into a slot; does not wait for it.

        Arguments as Decoder.admit, with hidden: float16[encoder_sequence_length, d_model] from GpuPacker.

        Raises:
            EngineError: if the question has more tokens than a slot can hold.
        """
        length = len(hidden)
        if length > self._encoded:
            raise EngineError(f"passages of a question: wanted at most {self._encoded} tokens, which a slot holds, got {length}")
        row = self._cache_rows[slot]
        self._lengths[row] = length
        with self._device, self._stream:
            written = self._half_cross_kv if self._cross_fp8 else self._cross_caches[:, row]
            outputs = {f"cross_kv.{layer}": cache[:length] for layer, cache in zip(self._cross_cache, written, strict=True)}
            self._cross_kv.bind({"encoder_hidden_states": hidden}, outputs).enqueue(self._stream)
            if self._cross_fp8:
                self._kernels.quantize_cross_kv(self._half_cross_kv, self._cross_scales, length, self._cross_caches, row)
            if self._cross_bias is not None:
                self._encoder_positions[row, :length] = cp.asarray(encoder_positions)
        self._pending_hidden.append(hidden)

    def move(self, source: int, target: int) -> None:
        """Swap the cache rows of the slots `source` and `target`."""
        rows = self._cache_rows
        rows[source], rows[target] = rows[target], rows[source]

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for slots 0 to len(tokens)-1; arguments and results as Decoder.step.

        The cross-attention is zero for sequences that are not at position 0.

        Raises:
            EngineError: if a position exceeds a slot; the kernels would write outside the cache.
        """
        batch, furthest = len(tokens), int(positions.max())
        if furthest >= self._generated:
            raise EngineError(
                f"position in the answer: wanted less than {self._generated}, the tokens that a slot holds, got {furthest}; "
                "ask for fewer new tokens, or raise max_new_tokens in the limits"
            )
        state, rows = self._host_state, self._cache_rows[:batch]
        state[TOKENS, :batch] = tokens
        state[POSITIONS, :batch] = positions
        state[POSITIONS, batch:] = -1
        state[SLOTS, :batch] = rows
        state[LENGTHS, :batch] = [self._lengths[row] for row in rows]
        state[LENGTHS, batch:] = 0
        state[PENALTY, :batch] = np.asarray(eos_penalty, np.float32).view(np.int32)
        at_start = np.flatnonzero(positions == 0)
        with self._device, self._stream:
            self._steps[bucket_of(batch, self._buckets), len(at_start) > 0]()
            self._stream.synchronize()
        self._pending_hidden.clear()
        longest = int(state[LENGTHS, at_start].max()) if len(at_start) else 0
        attribution = np.zeros((batch, longest), np.float32)
        if longest:
            with self._device, self._stream:
                attribution[at_start] = cp.asnumpy(self._attribution[cp.asarray(at_start), :longest])
        result = self._host_result
        return result[0, :batch].copy(), result[1, :batch].view(np.float32).copy(), attribution


def _as_splits(rows: cp.ndarray, k_splits: int) -> cp.ndarray:
    """The memory of `rows` [rows, columns] in the shape of a split-K GEMM's input: [k_splits, rows, columns / k_splits]."""
    return rows if k_splits == 1 else rows.reshape(k_splits, len(rows), -1)


def _require_fp8(directory: Path, device: cp.cuda.Device) -> None:
    found = int(device.compute_capability)
    if found < FP8_CAPABILITY:
        raise EngineError(
            f"{directory}: FP8 keys and values of cross-attention: wanted a GPU of compute capability {FP8_CAPABILITY / 10} or later, "
            f"got {found / 10}; export the reader with --cross-kv-precision float16"
        )


def require_free(memory: GpuMemory, slots: int, allocated: int) -> None:
    """Raise EngineError unless the GPU has room for what is not yet allocated."""
    free, total = cp.cuda.runtime.memGetInfo()
    needed = memory.total - allocated
    if needed > free:
        raise EngineError(
            f"GPU memory: wanted {needed:,} more bytes for {slots} slots, got {free:,} free bytes of {total:,}; "
            f"lower slots, kv_cache_bytes, max_passages or max_new_tokens. Planned: {memory}"
        )
