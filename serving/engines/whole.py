"""A reader of three whole graphs on a GPU: encoder, cross_kv and decoder_step as one engine each, without any kernel of ours.

In: engines of any GPU and any TensorRT from 8.6 on, or ONNX Runtime's CUDA provider. Out: an `Encoder` and a `Decoder` (base.py). Passages
are padded to the longest of a call, and caches are as long as the longest running question needs. A step is one CUDA graph where the engine
can be captured. gpu/encoder.py and gpu/decoder.py, made of GEMMs and kernels, compute no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cupy as cp
import numpy as np

from serving.contract.call_sizes import batch_buckets, bucket_of, encoder_batch, encoder_tokens
from serving.contract.kv_memory import MIN_SELF_LENGTH, cache_length, decoder_memory, self_cache_length
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest
from serving.contract.tensors import cross_kv_tensors, decoder_step_tensors, encoder_tensors

from .cpu import grouped_by_length
from .gpu.cuda_graph import CudaGraph
from .gpu.decoder import require_free
from .gpu.engine import LoadEngine, Scratch

TOKENS, POSITIONS, LENGTHS, PENALTY = range(4)  # rows of the state that each step uploads


class WholeEncoder:
    """Encodes passages of any lengths in calls of similar lengths. Not safe to call from two threads at once.

    Args:
        directory: of the engines.
        manifest: of the engines.
        load: loads an engine by its name.
        limits: bounds of a call.

    Attributes:
        bytes: device memory of weights and activations.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if the engine cannot run here.
    """

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, limits: Limits):
        self.sizes = manifest.sizes
        self._passage_length = manifest.prompt.passage_length
        self._rows, self._tokens = encoder_batch(limits), encoder_tokens(limits, self._passage_length)
        self._stream = cp.cuda.Stream(non_blocking=True)
        with self._stream:
            scratch = Scratch()
            self._engine = load("encoder", encoder_tensors(self.sizes, "float16"), scratch)
            self.bytes = self._engine.weight_bytes + scratch.bytes
            self.encode([(np.ones((1, self._passage_length), np.int32),) * 2])  # the first call of an engine allocates

    def encode(self, batch: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[cp.ndarray]:
        """Encode the passages of several questions at once; arguments as Encoder.encode.

        A passage of more than the reader's passage_length tokens is truncated.

        Returns:
            float16[n_passages, passage_length, d_model] of each question, on the GPU and finished; zero where the mask is.
        """
        width = self.sizes.d_model_encoder
        ends = np.cumsum([ids.size for ids, _ in batch])
        rows = [
            (int(length), question, row)
            for question, (_, mask) in enumerate(batch)
            for row, length in enumerate(mask.sum(1).clip(max=self._passage_length))
        ]
        with self._stream:
            states = cp.zeros((int(ends[-1]), width), cp.float16)
            for group in grouped_by_length(rows, self._tokens, self._rows):
                longest = group[0][0]
                ids, mask = np.zeros((2, len(group), longest), np.int32)
                source, target = [], []
                for i, (length, question, row) in enumerate(group):
                    padded = batch[question][0]
                    ids[i, :length] = padded[row, :length].clip(0, self.sizes.vocab_size - 1)
                    mask[i, :length] = 1
                    first = ends[question] - padded.size + row * padded.shape[1]
                    source.append(np.arange(i * longest, i * longest + length, dtype=np.int32))
                    target.append(np.arange(first, first + length, dtype=np.int32))
                hidden = cp.empty((len(group), longest, width), cp.float16)
                inputs = {"input_ids": cp.asarray(ids), "attention_mask": cp.asarray(mask)}
                self._engine.bind(inputs, {"encoder_hidden_states": hidden}).enqueue(self._stream)
                found = hidden.reshape(-1, width)[cp.asarray(np.concatenate(source))]
                states[cp.asarray(np.concatenate(target))] = found
                self._stream.synchronize()  # the arrays of the call may be freed
        questions = zip(batch, ends, strict=True)
        return [states[end - ids.size : end].reshape(*ids.shape, width) for (ids, _), end in questions]


class WholeDecoder:
    """The engines cross_kv and decoder_step with their caches. The running sequences are in slots 0 to count-1, each a row of every cache.

    Args:
        directory: of the engines.
        manifest: of the engines.
        load: loads an engine by its name.
        slots: sequences that can be decoded together.
        capacities: (encoded, generated) tokens that a slot can hold.

    Attributes:
        memory: device memory of all of it, with caches for the largest questions; the caches take it when such questions come.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if an engine cannot run here, or the memory does not suffice.
    """

    has_beams = can_drop = False

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, slots: int, capacities: tuple[int, int]):
        sizes = self.sizes = manifest.sizes
        self.slots = slots
        self._encoded, self._generated = capacities
        self._device = cp.cuda.Device()  # of the thread that loads; the scheduler's thread enters it for each call
        self._stream = cp.cuda.Stream(non_blocking=True)
        self._self_count, self._cross_count = 2 * sizes.num_decoder_layers, 2 * len(sizes.cross_attention_layers)
        with self._stream:
            scratch = Scratch()
            self._cross_tensors, self._tensors = cross_kv_tensors(sizes, "float16"), decoder_step_tensors(sizes, "float16")
            self._cross_kv = load("cross_kv", self._cross_tensors, scratch)
            self._step = load("decoder_step", self._tensors, scratch)
            weights = self._cross_kv.weight_bytes + self._step.weight_bytes
            self.memory = decoder_memory(sizes, slots, capacities, weights, scratch.bytes)
            require_free(self.memory, slots, allocated=weights)
            self._lengths = np.zeros(slots, np.int32)
            self._self = self._zeros(self._self_count, MIN_SELF_LENGTH)
            self._cross = [self._zeros(1, cache_length(1))[0] for _ in range(self._cross_count)]
            self._positions = np.zeros((slots, cache_length(1)), np.int32)  # of encoded tokens in the padded sequence
            self._new = cp.zeros((self._self_count, slots, sizes.num_kv_heads, sizes.d_kv), cp.float16)
            self._state = cp.zeros((4, slots), cp.int32)
            self._next, self._log_prob = cp.zeros(slots, cp.int32), cp.zeros(slots, cp.float32)
            self._buckets = batch_buckets(slots)
            self._prepared: dict[int, Callable[[], None]] = {}  # bucket -> a step on the caches as they are
            self._lengthened()

    def _zeros(self, tensors: int, length: int) -> cp.ndarray:
        # zeros: masked keys have the weight 0, but 0 * NaN is NaN
        return cp.zeros((tensors, self.slots, self.sizes.num_kv_heads, length, self.sizes.d_kv), cp.float16)

    def _lengthened(self) -> None:
        """The caches are other arrays now: nothing that was bound to the former ones may run."""
        self._prepared.clear()
        length = self._cross[0].shape[2]
        self._attribution = cp.zeros((self.slots, length), cp.float32)
        self._key_positions = cp.asarray(self._positions)

    def _resize_cross(self, length: int, rows: int) -> None:
        kept = min(length, self._cross[0].shape[2])
        for i, old in enumerate(self._cross):  # one after the other, so that only one of them exists twice at a time
            self._cross[i] = self._zeros(1, length)[0]
            self._cross[i][:rows, :, :kept] = old[:rows, :, :kept]
        positions = np.zeros((self.slots, length), np.int32)
        positions[:rows, :kept] = self._positions[:rows, :kept]
        self._positions = positions
        self._lengthened()

    def _resize_self(self, length: int, rows: int) -> None:
        old, kept = self._self, min(length, self._self.shape[3])
        self._self = self._zeros(self._self_count, length)
        self._self[:, :rows, :, :kept] = old[:, :rows, :, :kept]
        self._lengthened()

    def reserved_bytes(self) -> int:
        """Bytes of the caches at present."""
        return int(self._self.nbytes + sum(cache.nbytes for cache in self._cross))

    def admit(self, slot: int, running: int, hidden: cp.ndarray, encoder_positions: np.ndarray) -> None:
        """Compute a question's cross-attention keys and values into a slot.

        Arguments as Decoder.admit, with hidden: float16[encoder_sequence_length, d_model] from GpuPacker.

        Raises:
            EngineError: if the question has more tokens than a slot can hold.
        """
        length = len(hidden)
        if length > self._encoded:
            raise EngineError(f"passages of a question: wanted at most {self._encoded} tokens, which a slot holds, got {length}")
        self._lengths[slot] = length
        rows = max(running, slot + 1)
        with self._device, self._stream:
            needed, held = cache_length(int(self._lengths[:rows].max())), self._cross[0].shape[2]
            if needed > held or needed * 2 <= held:
                self._resize_cross(needed, rows)
            shape = (self._cross_count, self.sizes.num_kv_heads, length, self.sizes.d_kv)
            present = cp.empty(shape, cp.float16)
            outputs = {spec.name: present[i] for i, spec in enumerate(self._cross_tensors.outputs)}
            self._cross_kv.bind({"encoder_hidden_states": hidden}, outputs).enqueue(self._stream)
            for cache, tokens in zip(self._cross, present, strict=True):
                cache[slot, :, :length] = tokens
            self._positions[slot, :length] = encoder_positions
            self._key_positions[slot, :length] = cp.asarray(encoder_positions.astype(np.int32))
            self._stream.synchronize()  # `hidden` and `present` may be freed

    def move(self, source: int, target: int) -> None:
        """Copy the caches of slot `source` to slot `target`."""
        self._lengths[target], self._positions[target] = self._lengths[source], self._positions[source]
        with self._device, self._stream:
            self._self[:, target] = self._self[:, source]
            self._key_positions[target] = self._key_positions[source]
            for cache in self._cross:
                cache[target] = cache[source]

    def _prepare(self, bucket: int) -> Callable[[], None]:
        """A step of `bucket` rows on the caches as they are, captured if the engine can be."""
        values: dict[str, cp.ndarray] = {
            "decoder_input_ids": self._state[TOKENS],
            "positions": self._state[POSITIONS],
            "encoder_lengths": self._state[LENGTHS],
            "eos_penalty": self._state[PENALTY].view(cp.float32),
            "encoder_positions": self._key_positions,
            "next_token": self._next,
            "log_prob": self._log_prob,
            "cross_attention": self._attribution,
        }
        parts = [(i, part) for i in range(self.sizes.num_decoder_layers) for part in ("key", "value")]
        values |= {f"past_key_values.{i}.decoder.{part}": cache for (i, part), cache in zip(parts, self._self, strict=True)}
        values |= {f"present.{i}.decoder.{part}": new for (i, part), new in zip(parts, self._new, strict=True)}
        crossing = [(i, part) for i in self.sizes.cross_attention_layers for part in ("key", "value")]
        values |= {f"past_key_values.{i}.encoder.{part}": cache for (i, part), cache in zip(crossing, self._cross, strict=True)}
        inputs, outputs = ({s.name: values[s.name][:bucket] for s in specs} for specs in (self._tensors.inputs, self._tensors.outputs))
        call = self._step.bind(inputs, outputs, context=bucket)

        def run() -> None:
            call.enqueue(self._stream)

        if not self._step.capturable:
            return run
        run()  # the first call of a context may allocate, which a capture cannot
        self._stream.synchronize()
        graph = CudaGraph(self._stream, run)
        return lambda: graph.launch(self._stream)

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for slots 0 to len(tokens)-1; arguments and results as Decoder.step.

        Raises:
            EngineError: if a position exceeds a slot.
        """
        batch, needed = len(tokens), int(positions.max()) + 1
        if needed > self._generated:
            raise EngineError(
                f"position in the answer: wanted less than {self._generated}, the tokens that a slot holds, got {needed - 1}; "
                "ask for fewer new tokens, or raise max_new_tokens in the limits"
            )
        state = np.zeros((4, self.slots), np.int32)
        state[TOKENS, :batch], state[POSITIONS, :batch] = tokens, positions
        state[LENGTHS, :batch] = self._lengths[:batch]
        state[PENALTY, :batch] = np.asarray(eos_penalty, np.float32).view(np.int32)
        with self._device, self._stream:
            held = self._self.shape[3]
            if needed > held or (held > MIN_SELF_LENGTH and needed * 4 <= held):
                self._resize_self(self_cache_length(needed), batch)
            self._state[:] = cp.asarray(state)
            bucket = bucket_of(batch, self._buckets)
            if bucket not in self._prepared:
                self._prepared[bucket] = self._prepare(bucket)
            self._prepared[bucket]()
            rows, places = cp.asarray(np.arange(batch, dtype=np.int32)), self._state[POSITIONS, :batch]
            self._self[:, rows, :, places] = self._new[:, :batch].transpose(1, 0, 2, 3)
            next_token, log_prob = cp.asnumpy(self._next[:batch]), cp.asnumpy(self._log_prob[:batch])
            at_start = bool((positions == 0).any())
            attribution = cp.asnumpy(self._attribution[:batch]) if at_start else np.zeros((batch, 0), np.float32)
            self._stream.synchronize()
        return next_token.copy(), log_prob.copy(), attribution.copy()
