"""The decoder on a GPU: its gemms, by kernel or engine, with kernels between them, caches in fixed slots, CUDA graphs.

Each batch bucket has two graphs: of a step in which some answer gets its first token, which leaves attribution, and of one without.

It is a `DecoderEngine` (pipeline/scheduler.py). All of its work goes to one stream; a step costs the host one graph launch and one wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import cupy as cp
import cupyx
import numpy as np

from serving.contract.gemms import (
    BIAS,
    CROSS_BIAS,
    EMBEDDING,
    HEAD,
    NORMS,
    array_file,
    decoder_gemms,
    packed_cross_kv_tensors,
    split_k_of,
)
from serving.contract.gpu_profiles import GpuMemory, batch_buckets, bucket_of, decoder_memory
from serving.contract.manifest import EngineError, Manifest

from .cuda_graph import CudaGraph
from .engine import LoadEngine, Scratch
from .kernels import HeadKernels, RowKernels, SkinnyGemm, StepKernels
from .weights import load_arrays, load_gemms, weight_bytes

TOKENS, POSITIONS, SLOTS, LENGTHS, PENALTY = range(5)  # rows of the state that every step uploads
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


class GpuDecoder:
    """cross_kv and the step's gemms with their caches.

    Args:
        directory: of the engines.
        manifest: theirs.
        load: makes the engine of a name.
        slots: answers that may run together.
        capacities: tokens that a slot has room for: encoded, generated.
    """

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, slots: int, capacities: tuple[int, int]):
        sizes = self.sizes = manifest.sizes
        stack = manifest.decoder
        if stack is None:
            raise EngineError(f"{directory}: the decoder is one graph, not the gemms that a GPU runs; `make export` makes it again")
        self._stack = stack
        self.slots = slots
        self._encoded, self._generated = capacities
        self._device = cp.cuda.Device()  # of the thread that loads; the loop's thread makes it its own
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
            self._rows, self._kernels = RowKernels(stack), StepKernels(sizes)
            self._head_kernels = HeadKernels(sizes.d_model_decoder, sizes.vocab_size, manifest.eos_token_id)
            working = self._allocate_working()
            self.memory = decoder_memory(sizes, slots, capacities, weights, scratch.bytes + working)
            _require_room(self.memory, slots, allocated=weights + working)
            self._allocate_caches()
            self._buckets = batch_buckets(slots)
            variants = [(bucket, first) for bucket in self._buckets for first in (False, True)]
            self._steps = {variant: self._prepare(*variant) for variant in variants}
            self._stream.synchronize()

    def _allocate_working(self) -> int:
        """What a step works in, and its bytes.

        Graphs run one after the other, so all have the same; a buffer holds what no two kernels need at once.
        """
        sizes, slots = self.sizes, self.slots
        widest = max(split_k_of(self._stack, gemm) * loaded.weight.shape[-1] for gemm, loaded in self._gemms.items())
        self._residual = cp.empty((slots, sizes.d_model_decoder), cp.float32)
        self._normed = cp.empty((slots, sizes.d_model_decoder), cp.float16)
        self._attended = cp.empty((slots, sizes.num_heads * sizes.d_kv), cp.float16)
        self._activated = cp.empty((slots, self._stack.d_ff), cp.float16)
        self._made = cp.empty(slots * widest, cp.float16)
        self._partial = cp.empty((slots, sizes.num_heads, self._kernels.max_splits(self._encoded), sizes.d_kv + 2), cp.float32)
        self._softmax = cp.empty((slots, sizes.num_heads, 2), cp.float32)
        self._attribution = cp.zeros((slots, self._encoded), cp.float32)
        self._found = self._head_kernels.scratch(slots)
        buffers = (
            self._residual,
            self._normed,
            self._attended,
            self._activated,
            self._made,
            self._partial,
            self._softmax,
            self._attribution,
        )
        return sum(buffer.nbytes for buffer in buffers)

    def _allocate_caches(self) -> None:
        sizes, slots = self.sizes, self.slots
        width = 2 * sizes.num_kv_heads * sizes.d_kv
        # zeros: what is masked is never read, but what is not yet written must not be a NaN in a test's dump either
        self._self_cache = {i: cp.zeros((slots, self._generated, width), cp.float16) for i in range(sizes.num_decoder_layers)}
        self._cross_cache = {i: cp.zeros((slots, self._encoded, width), cp.float16) for i in sizes.cross_attention_layers}
        self._encoder_positions = cp.zeros((slots, self._encoded if self._cross_bias is not None else 1), cp.int32)
        self._state = cp.zeros((5, slots), cp.int32)
        self._host_state = cupyx.zeros_pinned((5, slots), np.int32)
        self._picked = cp.zeros((2, slots), cp.int32)  # tokens, and the bits of their log-probabilities
        self._host_picked = cupyx.zeros_pinned((2, slots), np.int32)
        self._slot_of = list(range(slots))  # where the caches of the loop's slot lie: moving an answer moves no caches
        self._lengths = [0] * slots
        self._bound: list[object] = []
        self._reading: list[cp.ndarray] = []  # hidden states that the stream may not have read yet

    def _prepare(self, bucket: int, first: bool) -> Callable[[], None]:
        """Run a step of a batch size once, and capture it into a graph where every engine can be captured."""
        program = self._program(bucket, first)
        self._bound.append(program)  # a graph knows addresses only: what lies there must live as long
        self._host_state[:] = 0
        self._host_state[POSITIONS] = -1

        def run() -> None:
            stream, copy = self._stream.ptr, cp.cuda.runtime.memcpyAsync
            copy(self._state.data.ptr, self._host_state.ctypes.data, self._state.nbytes, HOST_TO_DEVICE, stream)
            for operation in program:
                operation()
            copy(self._host_picked.ctypes.data, self._picked.data.ptr, self._picked.nbytes, DEVICE_TO_HOST, stream)

        run()
        self._stream.synchronize()
        if not all(gemm.engine.capturable for gemm in self._gemms.values()):
            return run
        graph = CudaGraph(self._stream, run)
        return lambda: graph.launch(self._stream)

    def _program(self, bucket: int, first: bool) -> list[Callable[[], None]]:
        """A step of `bucket` rows, some at their first token or none, as what is to be enqueued one after the other."""
        rows, kernels, sizes = self._rows, self._kernels, self.sizes
        positions, slots, lengths = (self._state[i, :bucket] for i in (POSITIONS, SLOTS, LENGTHS))
        residual, normed, activated = self._residual[:bucket], self._normed[:bucket], self._activated[:bucket]
        attended, partial, softmax = self._attended[:bucket], self._partial[:bucket], self._softmax[:bucket]
        norms, gemms = iter(self._norms), list(self._gemms)
        k_splits = [split_k_of(self._stack, gemm) for gemm in gemms] + [1]  # the head takes its rows as they are
        given = _as_splits(normed, k_splits[0])
        tokens = self._state[TOKENS, :bucket]
        program: list[Callable[[], None]] = [functools.partial(rows.embed, tokens, self._embedding, next(norms), residual, given)]
        for gemm, own, next_splits in zip(gemms, k_splits, k_splits[1:], strict=False):
            loaded = self._gemms[gemm]
            width = loaded.weight.shape[-1]
            made = self._made[: own * bucket * width].reshape((own, bucket, width) if own > 1 else (bucket, width))
            program.append(functools.partial(loaded.enqueue, given, made, self._stream, context=bucket))
            if gemm.kind == "qkv":
                given, cache = _as_splits(attended, next_splits), self._self_cache[gemm.layer]
                program.append(functools.partial(kernels.self_attention, made, cache, slots, positions, self._self_bias, given))
            elif gemm.kind == "cross_q":
                given, cache = _as_splits(attended, next_splits), self._cross_cache[gemm.layer]
                at = (made, cache, slots, lengths, positions, self._cross_bias, self._encoder_positions)
                program.append(functools.partial(kernels.cross_attention, *at, partial, softmax, given))
                if first:
                    number = sizes.cross_attention_layers.index(gemm.layer)
                    program.append(functools.partial(kernels.attribution, *at, softmax, number, self._attribution[:bucket]))
            elif gemm.kind == "wi":
                given = _as_splits(activated, next_splits)
                program.append(functools.partial(rows.activate, made, given))
            else:
                given = _as_splits(normed, next_splits)
                program.append(functools.partial(rows.add_and_norm, made, next(norms), residual, given))
        penalty, log_prob = self._state[PENALTY, :bucket].view(cp.float32), self._picked[1].view(cp.float32)
        chosen = (self._found, self._picked[0], log_prob)
        program.append(functools.partial(self._head_kernels.combine_argmax, given, self._head, penalty, *chosen))
        return program

    def reserved_bytes(self) -> int:
        """Bytes that the caches take."""
        return self.memory.cross_kv + self.memory.self_kv

    def admit(self, slot: int, running: int, hidden: cp.ndarray, encoder_positions: np.ndarray) -> None:
        """Compute a question's cross-attention keys and values straight into a slot; does not wait for it.

        Args:
            slot: free, at most `running`.
            running: rows in use.
            hidden: float16[encoder_sequence_length, d_model] from GpuPacker.
            encoder_positions: int32[encoder_sequence_length].

        Raises:
            EngineError: if the question is longer than a slot.
        """
        length = len(hidden)
        if length > self._encoded:
            raise EngineError(f"the question has {length} tokens in its passages, but a slot holds {self._encoded}")
        place = self._slot_of[slot]
        self._lengths[place] = length
        with self._device, self._stream:
            outputs = {f"cross_kv.{layer}": cache[place, :length] for layer, cache in self._cross_cache.items()}
            self._cross_kv.bind({"encoder_hidden_states": hidden}, outputs).enqueue(self._stream)
            if self._cross_bias is not None:
                self._encoder_positions[place, :length] = cp.asarray(encoder_positions)
        self._reading.append(hidden)

    def move(self, source: int, target: int) -> None:
        """Give the answer in slot `source` the slot `target`."""
        places = self._slot_of
        places[source], places[target] = places[target], places[source]

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One token for slots 0 to len(tokens)-1; arguments and results as OnnxDecoder.step.

        The cross-attention is filled in for rows at position 0 only, which are those that anyone asks for.
        """
        batch = len(tokens)
        state, places = self._host_state, self._slot_of[:batch]
        state[TOKENS, :batch] = tokens
        state[POSITIONS, :batch] = positions
        state[POSITIONS, batch:] = -1
        state[SLOTS, :batch] = places
        state[LENGTHS, :batch] = [self._lengths[place] for place in places]
        state[LENGTHS, batch:] = 0
        state[PENALTY, :batch] = np.asarray(eos_penalty, np.float32).view(np.int32)
        fresh = np.flatnonzero(positions == 0)
        with self._device, self._stream:
            self._steps[bucket_of(batch, self._buckets), len(fresh) > 0]()
            self._stream.synchronize()
        self._reading.clear()
        longest = int(state[LENGTHS, fresh].max()) if len(fresh) else 0
        attribution = np.zeros((batch, longest), np.float32)
        if longest:
            with self._device, self._stream:
                attribution[fresh] = cp.asnumpy(self._attribution[cp.asarray(fresh), :longest])
        picked = self._host_picked
        return picked[0, :batch].copy(), picked[1, :batch].view(np.float32).copy(), attribution


def _as_splits(rows: cp.ndarray, k_splits: int) -> cp.ndarray:
    """Memory of [rows, columns] as a gemm in k_splits takes it: [k_splits, rows, columns / k_splits]."""
    return rows if k_splits == 1 else rows.reshape(k_splits, len(rows), -1)


def _require_room(memory: GpuMemory, slots: int, allocated: int) -> None:
    free, total = cp.cuda.runtime.memGetInfo()
    needed = memory.total - allocated
    if needed > free:
        raise EngineError(
            f"GPU memory: wanted {needed:,} bytes more for {slots} slots, got {free:,} free of {total:,}; "
            f"lower slots, kv_cache_bytes, max_passages or max_new_tokens. Planned: {memory}"
        )
