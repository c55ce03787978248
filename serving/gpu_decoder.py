"""The decoder on a GPU: engine parts with attention kernels between them, one CUDA graph a batch bucket, caches in fixed slots.

It is a `DecoderEngine` (decode_loop.py). All of its work goes to one stream; a step costs the host one graph launch and one wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cupy as cp
import cupyx
import numpy as np

from .gpu_engine import Call, LoadEngine, Scratch
from .gpu_kernels import StepKernels, splits_of
from .gpu_plan import GpuMemory, batch_buckets, bucket_of, decoder_memory
from .manifest import EngineError, Manifest
from .step_parts import StepPart, packed_cross_kv_tensors, step_part_tensors, step_parts

TOKENS, POSITIONS, SLOTS, LENGTHS, PENALTY = range(5)  # rows of the state that every step uploads
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


class GpuDecoder:
    """cross_kv and the step's parts with their caches.

    Args:
        directory: of the engines.
        manifest: theirs.
        load: makes the engine of a name.
        slots: answers that may run together.
        capacities: tokens that a slot has room for: encoded, generated.
    """

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, slots: int, capacities: tuple[int, int]):
        sizes = self.sizes = manifest.sizes
        self.slots = slots
        self._encoded, self._generated = capacities
        self._device = cp.cuda.Device()  # of the thread that loads; the loop's thread makes it its own
        self._stream = cp.cuda.Stream(non_blocking=True)
        # one for all threads that pack: CuPy keeps freed memory by stream, and what a new stream is given comes from cudaMalloc
        self._packing = cp.cuda.Stream(non_blocking=True)
        with self._stream:
            scratch = Scratch()
            self._cross_kv = load("cross_kv", packed_cross_kv_tensors(sizes), scratch)
            self._parts = [(part, load(part.name, step_part_tensors(sizes, part), scratch)) for part in step_parts(sizes)]
            engines = [self._cross_kv, *(engine for _, engine in self._parts)]
            self.memory = decoder_memory(sizes, slots, capacities, sum(engine.weight_bytes for engine in engines), scratch.bytes)
            _require_room(self.memory, slots)
            self._kernels = StepKernels(sizes, manifest.eos_token_id)
            self._load_biases(directory, manifest)
            self._allocate()
            self._steps = {bucket: self._prepare(bucket) for bucket in batch_buckets(slots)}
            self._stream.synchronize()

    def _load_biases(self, directory: Path, manifest: Manifest) -> None:
        names = [name for name in ("self_attention_bias.npy", "cross_attention_bias.npy") if name in manifest.files]
        manifest.verify(directory, tuple(names))
        tables = [cp.asarray(np.load(directory / name, allow_pickle=False)) for name in names]
        self._self_bias, self._cross_bias = tables[0], tables[1] if len(tables) > 1 else None

    def _allocate(self) -> None:
        sizes, slots = self.sizes, self.slots
        width = 2 * sizes.num_kv_heads * sizes.d_kv
        # zeros: what is masked is never read, but what is not yet written must not be a NaN in a test's dump either
        self._self_cache = {i: cp.zeros((slots, self._generated, width), cp.float16) for i in range(sizes.num_decoder_layers)}
        self._cross_cache = {i: cp.zeros((slots, self._encoded, width), cp.float16) for i in sizes.cross_attention_layers}
        self._encoder_positions = cp.zeros((slots, self._encoded if self._cross_bias is not None else 1), cp.int32)
        self._partial = cp.empty((slots, sizes.num_heads, splits_of(self._encoded), sizes.d_kv + 2), cp.float32)
        self._softmax = cp.empty((slots, sizes.num_heads, 2), cp.float32)
        self._evidence = cp.zeros((slots, self._encoded), cp.float32)
        self._attended = cp.empty((slots, sizes.num_heads * sizes.d_kv), cp.float32)
        self._state = cp.zeros((5, slots), cp.int32)
        self._host_state = cupyx.zeros_pinned((5, slots), np.int32)
        self._picked = cp.zeros((2, slots), cp.int32)  # tokens, and the bits of their log-probabilities
        self._host_picked = cupyx.zeros_pinned((2, slots), np.int32)
        self._slot_of = list(range(slots))  # where the caches of the loop's slot lie: moving an answer moves no caches
        self._lengths = [0] * slots
        self._bound: list[object] = []
        self._reading: list[cp.ndarray] = []  # hidden states that the stream may not have read yet

    def _prepare(self, bucket: int) -> Callable[[], None]:
        """Bind all parts for a batch, run once, and capture a graph where every engine can be captured."""
        calls, made = self._bind(bucket)
        self._bound.append((calls, made))  # a graph knows addresses only: what lies there must live as long
        self._host_state[:] = 0
        self._host_state[POSITIONS] = -1

        def run() -> None:
            self._enqueue(bucket, calls, made)

        run()
        self._stream.synchronize()
        if not all(engine.capturable for _, engine in self._parts):
            return run
        self._stream.begin_capture()
        run()
        graph = self._stream.end_capture()
        graph.upload(self._stream)
        return lambda: graph.launch(self._stream)

    def _bind(self, bucket: int) -> tuple[list[tuple[StepPart, Call]], list[cp.ndarray]]:
        """The parts' calls, and beside each the output that the attention after it (or the choice of the token) reads."""
        residual: cp.ndarray | None = None
        # written and read in turn: no part may overwrite the residual stream that it reads
        residuals = [cp.empty((bucket, self.sizes.d_model_decoder), cp.float32) for _ in range(2)]
        self._bound.append(residuals)
        calls, made = [], []
        for part, engine in self._parts:
            specs = step_part_tensors(self.sizes, part)
            inputs = {"decoder_input_ids": self._state[TOKENS, :bucket]}
            if residual is not None:
                inputs = {"residual": residual, "attended": self._attended[:bucket]}
            outputs = {spec.name: cp.empty(spec.shape({"batch": bucket}), cp.float32) for spec in specs.outputs[-1:]}
            if part.before is not None:
                outputs["new_residual"] = residuals[0] if residual is not residuals[0] else residuals[1]
            calls.append((part, engine.bind(inputs, outputs, own=True)))
            residual = outputs.get("new_residual")
            made.append(outputs[specs.outputs[-1].name])
        return calls, made

    def _enqueue(self, bucket: int, calls: list[tuple[StepPart, Call]], made: list[cp.ndarray]) -> None:
        stream, kernels = self._stream, self._kernels
        cp.cuda.runtime.memcpyAsync(self._state.data.ptr, self._host_state.ctypes.data, self._state.nbytes, HOST_TO_DEVICE, stream.ptr)
        positions, slots, lengths = (self._state[i, :bucket] for i in (POSITIONS, SLOTS, LENGTHS))
        attended, cross_layer = self._attended[:bucket], 0
        for (part, call), output in zip(calls, made, strict=True):
            call.enqueue(stream)
            site = part.before
            if site is None:
                penalty = self._state[PENALTY, :bucket].view(cp.float32)
                kernels.pick_token(output, penalty, self._picked[0], self._picked[1].view(cp.float32))
            elif site.kind == "self":
                kernels.self_attention(output, self._self_cache[site.layer], slots, positions, self._self_bias, attended)
            else:
                at = (output, self._cross_cache[site.layer], slots, lengths, positions, self._cross_bias, self._encoder_positions)
                kernels.cross_attention(*at, self._partial[:bucket], self._softmax[:bucket], attended)
                kernels.evidence(*at, self._softmax[:bucket], cross_layer, self._evidence[:bucket])
                cross_layer += 1
        cp.cuda.runtime.memcpyAsync(self._host_picked.ctypes.data, self._picked.data.ptr, self._picked.nbytes, DEVICE_TO_HOST, stream.ptr)

    def reserved_bytes(self) -> int:
        """Bytes that the caches take."""
        return self.memory.cross_kv + self.memory.self_kv

    def pack(self, states: object, mask: np.ndarray) -> cp.ndarray:
        """The valid hidden states of a question, one after the other; may be called from any thread.

        Args:
            states: float16[n_passages, passage_length, d_model], on the GPU or not.
            mask: int32[n_passages, passage_length].

        Returns:
            float16[encoder_sequence_length, d_model] on the GPU; the copy is finished.
        """
        with self._device, self._packing:
            on_gpu = states if isinstance(states, cp.ndarray) else cp.asarray(states)
            packed = on_gpu.reshape(-1, on_gpu.shape[-1])[cp.asarray(np.flatnonzero(mask).astype(np.int32))]
            self._packing.synchronize()
        return packed

    def admit(self, slot: int, running: int, hidden: cp.ndarray, encoder_positions: np.ndarray) -> None:
        """Compute a question's cross-attention keys and values straight into a slot; does not wait for it.

        Args:
            slot: free, at most `running`.
            running: rows in use.
            hidden: float16[encoder_sequence_length, d_model] from `pack`.
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
        with self._device, self._stream:
            self._steps[bucket_of(batch, tuple(self._steps))]()
            self._stream.synchronize()
        self._reading.clear()
        fresh = np.flatnonzero(positions == 0)
        longest = int(state[LENGTHS, fresh].max()) if len(fresh) else 0
        evidence = np.zeros((batch, longest), np.float32)
        if longest:
            with self._device, self._stream:
                evidence[fresh] = cp.asnumpy(self._evidence[cp.asarray(fresh), :longest])
        picked = self._host_picked
        return picked[0, :batch].copy(), picked[1, :batch].view(np.float32).copy(), evidence


def _require_room(memory: GpuMemory, slots: int) -> None:
    free, total = cp.cuda.runtime.memGetInfo()
    needed = memory.total - memory.weights  # the engines are loaded by now
    if needed > free:
        raise EngineError(
            f"GPU memory: wanted {needed:,} bytes more for {slots} slots, got {free:,} free of {total:,}; "
            f"lower slots, kv_cache_bytes, max_passages or max_new_tokens. Planned: {memory}"
        )
