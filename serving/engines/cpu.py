"""A reader on the CPU, by ONNX Runtime: the encoder, and the decoder with its key/value caches. openvino.py runs both on OpenVINO.

In: the graphs encoder.onnx, cross_kv.onnx and decoder_step.onnx. Out: an `Encoder` and a `Decoder` (base.py). The order in which sequences
enter and leave the slots is the scheduler's.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import onnxruntime as ort

from serving.contract.call_sizes import lanes_of
from serving.contract.kv_memory import MIN_SELF_LENGTH, cache_length, self_cache_length
from serving.contract.manifest import EngineError, Manifest, ManifestError
from serving.contract.tensors import GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors

# Larger calls are not faster on a CPU: their activations no longer fit into its caches.
MAX_TOKENS_PER_CALL = 4096
# A question is not split into smaller calls than this for the sake of a free lane.
MIN_TOKENS_PER_CALL = 256
# Rows of at least this fraction of a call's longest row join the call; shorter ones go into another call, to compute little padding.
MIN_LENGTH_FRACTION = 0.8
NEW_ROW = -1  # a sequence that has no row of the self-attention caches yet
LOGITS = "logits"  # the output of decoder_step that beam search reads


class Session(Protocol):
    """One graph, loaded, on `lanes` that run at the same time and share its weights. A lane is called from one thread at a time.

    Attributes:
        cache_dtype: of cached keys and values; uint16 holds the bits of bfloat16.
    """

    cache_dtype: np.dtype

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, threads: int, lanes: int = 1): ...

    def run(self, inputs: Mapping[str, np.ndarray], *, logits: bool = False, lane: int = 0) -> list[np.ndarray]:
        """All outputs, in the order of the tensor specs, valid until the lane's next call. Contiguous inputs are not copied.

        The last output of decoder_step is left out unless `logits` asks for it: only beam search reads it.
        """
        ...


class OnnxSession:
    """One graph on ONNX Runtime's CPU provider. A call computes on its own thread, and on the session's others if a lane has several.

    Raises:
        ManifestError: if its file is not the manifest's.
        EngineError: if ONNX Runtime cannot load it, or its tensors are not `tensors`.
    """

    cache_dtype = np.dtype(np.float32)

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, threads: int, lanes: int = 1):
        file = f"{name}.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads if lanes == 1 else max(threads // lanes, 1)
        # several processes share the cores: a thread that spins while it waits slows another engine
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # a step's int8 weights become fp32 once, not in every step
        options.log_severity_level = 3
        try:
            with manifest.verified(directory, (file,)):
                self._session = ort.InferenceSession(str(directory / file), options, providers=["CPUExecutionProvider"])
        except ManifestError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise EngineError(f"{directory / file}: ONNX Runtime cannot load it: {error}") from error
        require_tensors(
            directory / file, tensors, [i.name for i in self._session.get_inputs()], [o.name for o in self._session.get_outputs()]
        )

        self._outputs = [spec.name for spec in tensors.outputs]
        self._without_logits = [name for name in self._outputs if name != LOGITS]

    def run(self, inputs: Mapping[str, np.ndarray], *, logits: bool = False, lane: int = 0) -> list[np.ndarray]:
        """As Session.run."""
        return self._session.run(self._outputs if logits else self._without_logits, inputs)


def require_tensors(path: Path, tensors: GraphTensors, inputs: list[str], outputs: list[str]) -> None:
    """Raise EngineError unless a graph's inputs and outputs have the names of `tensors`, in their order."""
    wanted = [t.name for t in tensors.inputs], [t.name for t in tensors.outputs]
    if (inputs, outputs) != wanted:
        raise EngineError(f"{path}: wanted tensors {wanted}, got {(inputs, outputs)}; `make export` makes it again")


class CpuEncoder:
    """Encodes passages of any lengths; at most a fifth of a row that it computes is padding. A subclass says what runs the graph.

    The passages of a question are independent, so several calls of the graph run at the same time, on a few threads each: threads that
    share one call wait for each other at every operation.
    """

    session_type: ClassVar[type[Session]]

    def __init__(self, directory: Path, manifest: Manifest, threads: int = 0):
        threads = threads or len(os.sched_getaffinity(0))
        self.d_model = manifest.sizes.d_model_encoder
        self._lanes = lanes_of(threads)
        self._session = self.session_type(directory, manifest, "encoder", encoder_tensors(manifest.sizes), threads, self._lanes)
        self._others = ThreadPoolExecutor(max(self._lanes - 1, 1), thread_name_prefix="encoder-lane")
        # Each lane once on this thread: OpenVINO's binding sets itself up at its first call, and two first calls at once wait for each
        # other for ever (one holds Python's lock, the other that of the setting up).
        one_token = np.ones((1, 1), np.int32)
        for lane in range(self._lanes):
            self._session.run({"input_ids": one_token, "attention_mask": one_token}, lane=lane)

    def encode(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Encode the passages of several questions at once; arguments and results as Encoder.encode, in float32."""
        outputs = [np.zeros((*ids.shape, self.d_model), np.float32) for ids, _ in batch]
        rows = [(int(length), q, r) for q, (_, mask) in enumerate(batch) for r, length in enumerate(mask.sum(1))]
        tokens_per_call = min(MAX_TOKENS_PER_CALL, max(MIN_TOKENS_PER_CALL, -(-sum(length for length, _, _ in rows) // self._lanes)))
        groups = collections.deque(grouped_by_length(rows, tokens_per_call))

        def run(lane: int) -> None:
            while groups:
                try:
                    group = groups.popleft()
                except IndexError:  # another lane took the last one
                    return
                self._encode_group(group, batch, outputs, lane)

        others = [self._others.submit(run, lane) for lane in range(1, min(self._lanes, len(groups)))]
        try:
            run(0)
        finally:
            groups.clear()  # after an error nothing more is begun
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error
        return outputs

    def _encode_group(
        self, group: list[tuple[int, int, int]], batch: list[tuple[np.ndarray, np.ndarray]], outputs: list[np.ndarray], lane: int
    ) -> None:
        """One call of the graph; its rows of `outputs` are written."""
        width = group[0][0]
        ids = np.zeros((len(group), width), np.int32)
        for row, (length, q, r) in zip(ids, group, strict=True):
            row[:length] = batch[q][0][r, :length]
        mask = (np.arange(width)[None, :] < np.array([length for length, _, _ in group])[:, None]).astype(np.int32)
        (hidden,) = self._session.run({"input_ids": ids, "attention_mask": mask}, lane=lane)
        for states, (length, q, r) in zip(hidden, group, strict=True):
            outputs[q][r, :length] = states[:length]


def grouped_by_length(
    rows: list[tuple[int, int, int]], max_tokens_per_call: int = MAX_TOKENS_PER_CALL, max_rows: int | None = None
) -> list[list[tuple[int, int, int]]]:
    """Group (length, question, row) triples into calls of similar lengths, the longest first. Empty rows are omitted."""
    max_rows = max_rows or len(rows)
    groups: list[list[tuple[int, int, int]]] = []
    for row in sorted((row for row in rows if row[0]), reverse=True):
        group = groups[-1] if groups else []
        room = len(group) < max_rows and (len(group) + 1) * (group[0][0] if group else 0) <= max_tokens_per_call
        if group and row[0] >= MIN_LENGTH_FRACTION * group[0][0] and room:
            group.append(row)
        else:
            groups.append([row])
    return groups


class CpuDecoder:
    """cross_kv and decoder_step with their caches. The running questions are in slots 0 to count-1.

    A slot is a row of every cross-attention cache. Each sequence (one a question, or one a beam) is a row of every self-attention cache, in
    the order of the slots. A step takes its rows as contiguous blocks: the scheduler leaves no gaps between slots (`move`), and `step`
    gathers those rows of the self-attention caches whose place has changed. The beams of a question share its row of the cross-attention
    caches. The caches are as long as the longest running question needs: they grow for a longer one, and shrink once half of them or more
    is unused. A subclass says what runs the graphs.
    """

    has_beams = can_drop = True

    session_type: ClassVar[type[Session]]

    def __init__(self, directory: Path, manifest: Manifest, slots: int, threads: int = 0):
        sizes = manifest.sizes
        self.sizes, self.slots = sizes, slots
        self._cross_kv = self.session_type(directory, manifest, "cross_kv", cross_kv_tensors(sizes), threads)
        self._step = self.session_type(directory, manifest, "decoder_step", decoder_step_tensors(sizes, beams=True), threads)
        parts = ("key", "value")
        self._self_names = [f"past_key_values.{i}.decoder.{part}" for i in range(sizes.num_decoder_layers) for part in parts]
        self._cross_names = [f"past_key_values.{i}.encoder.{part}" for i in sizes.cross_attention_layers for part in parts]
        self._encoder_lengths = np.zeros(slots, np.int32)
        self._rows = [np.zeros(1, np.intp)] * slots  # of each slot: the rows of the self-attention caches that its sequences had last
        self._ordered = 0  # slots whose rows are known to be in order
        self._viewed = (0, 0)  # sequences and slots of `_views`
        self._numbers = np.arange(slots, dtype=np.int32)
        self._views: dict[str, np.ndarray] = {}  # the caches' running rows; empty where caches or their number have changed
        self._self = self._empty(len(self._self_names), MIN_SELF_LENGTH)
        self._cross = self._empty(len(self._cross_names), cache_length(1))
        self._encoder_positions = np.zeros((slots, cache_length(1)), np.int32)

    def _empty(self, tensors: int, length: int) -> list[np.ndarray]:
        # zeros, not np.empty: masked keys have the weight 0, but 0 * NaN is NaN
        shape = (self.slots, self.sizes.num_kv_heads, length, self.sizes.d_kv)
        return [np.zeros(shape, self._step.cache_dtype) for _ in range(tensors)]

    def _resize(self, caches: list[np.ndarray], length: int, rows: int) -> None:
        self._views = {}
        kept = min(length, caches[0].shape[2])
        for i, old in enumerate(caches):  # one after the other, so that only one of them exists twice at a time
            (caches[i],) = self._empty(1, length)
            caches[i][:rows, :, :kept] = old[:rows, :, :kept]

    def reserved_bytes(self) -> int:
        """Bytes of the caches at present."""
        return sum(cache.nbytes for cache in (*self._self, *self._cross))

    def admit(self, slot: int, running: int, hidden: np.ndarray, encoder_positions: np.ndarray, beams: int = 1) -> None:
        """Compute a question's cross-attention keys and values into a slot; arguments as BeamDecoder.admit, hidden in float32."""
        length = len(hidden)
        self._rows[slot] = np.full(beams, NEW_ROW)
        self._ordered = 0
        self._encoder_lengths[slot] = length
        self._fit_cross(max(running, slot + 1))
        present = self._cross_kv.run({"encoder_hidden_states": hidden})
        for cache, tokens in zip(self._cross, present, strict=True):
            cache[slot, :, :length] = tokens
        self._encoder_positions[slot, :length] = encoder_positions

    def _fit_cross(self, rows: int) -> None:
        """Make the cross-attention caches as long as the longest question in the first `rows` slots needs."""
        needed = cache_length(int(self._encoder_lengths[:rows].max()))
        held = self._cross[0].shape[2]
        if needed > held or needed * 2 <= held:
            self._resize(self._cross, needed, rows)
            positions = np.zeros((self.slots, needed), np.int32)
            kept = min(needed, held)
            positions[:rows, :kept] = self._encoder_positions[:rows, :kept]
            self._encoder_positions = positions

    def keep(self, slot: int, running: int, kept: np.ndarray) -> None:
        """Move the kept tokens' keys and values to the front of their slot; arguments as DroppingDecoder.keep."""
        count = len(kept)
        for cache in self._cross:
            cache[slot, :, :count] = cache[slot][:, kept]
        self._encoder_positions[slot, :count] = self._encoder_positions[slot, kept]
        self._encoder_lengths[slot] = count
        self._fit_cross(running)

    def move(self, source: int, target: int) -> None:
        """Copy the cross-attention cache of slot `source` to slot `target`; the next step gathers the rows of self-attention."""
        self._encoder_lengths[target] = self._encoder_lengths[source]
        self._encoder_positions[target] = self._encoder_positions[source]
        self._rows[target] = self._rows[source]
        self._ordered = 0
        for cache in self._cross:
            cache[target] = cache[source]

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for slots 0 to len(tokens)-1, of one sequence each; arguments and results as Decoder.step.

        The cross-attention is defined for sequences at any position.
        """
        slots = self._numbers[: len(tokens)]
        next_token, log_prob, cross_attention, *_ = self._run_step(tokens, positions, eos_penalty, slots, slots[:, None])
        return next_token, log_prob, cross_attention

    def beam_step(
        self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray, parents: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Decode one token for all sequences of slots 0 to len(parents)-1; arguments and results as BeamDecoder.beam_step."""
        counts = [len(of_slot) for of_slot in parents]
        first = np.cumsum([0, *counts[:-1]])
        width = max(counts)
        question_rows = (first[:, None] + np.minimum(np.arange(width), np.array(counts)[:, None] - 1)).astype(np.int32)
        row_places = np.concatenate([slot * width + np.arange(count) for slot, count in enumerate(counts)]).astype(np.int32)
        for slot, of_slot in enumerate(parents):
            self._rows[slot] = self._rows[slot][of_slot]
        self._ordered = 0
        found = self._run_step(tokens, positions, eos_penalty, row_places, question_rows, logits=True)
        return found[0], found[1], found[2], found[3]

    def _run_step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        eos_penalty: np.ndarray,
        row_places: np.ndarray,
        question_rows: np.ndarray,
        *,
        logits: bool = False,
    ) -> list[np.ndarray]:
        """Next tokens, log-probabilities, cross-attention and, if asked for, logits; the new keys and values are in the caches then."""
        batch, questions = len(tokens), len(question_rows)
        self._gather_rows(batch, questions)
        needed = int(positions.max()) + 1
        held = self._self[0].shape[2]
        if needed > held or (held > MIN_SELF_LENGTH and needed * 4 <= held):
            self._resize(self._self, self_cache_length(needed), batch)
        inputs = {"decoder_input_ids": tokens, "positions": positions, "eos_penalty": eos_penalty}
        inputs |= {"question_rows": question_rows, "row_places": row_places, **self._running(batch, questions)}
        next_token, log_prob, cross_attention, *rest = self._step.run(inputs, logits=logits)
        rows = np.arange(batch)
        for cache, new in zip(self._self, rest, strict=False):  # behind them come the logits
            cache[rows, :, positions] = new
        return [next_token, log_prob, cross_attention, *rest[len(self._self) :]]

    def _gather_rows(self, batch: int, questions: int) -> None:
        """Bring the rows of the self-attention caches into the order of the slots; a sequence that is new has none yet."""
        if self._ordered == questions:  # greedy sequences, as in the step before
            return
        self._ordered = questions
        sources = np.concatenate(self._rows[:questions])
        places = np.arange(batch)
        changed = np.flatnonzero((sources != places) & (sources != NEW_ROW))
        if len(changed):
            for cache in self._self:
                cache[changed] = cache[sources[changed]]
        first = 0
        for slot in range(questions):
            count = len(self._rows[slot])
            self._rows[slot] = places[first : first + count]
            first += count

    def _running(self, batch: int, questions: int) -> dict[str, np.ndarray]:
        """What is kept of slots 0 to questions-1 and their `batch` sequences: the same objects until one of them has moved."""
        if self._viewed != (batch, questions) or not self._views:
            of_questions = {"encoder_lengths": self._encoder_lengths}
            if self.sizes.reads_encoder_positions:
                of_questions["encoder_positions"] = self._encoder_positions
            of_questions |= zip(self._cross_names, self._cross, strict=True)
            self._views = {name: cache[:batch] for name, cache in zip(self._self_names, self._self, strict=True)}
            self._views |= {name: array[:questions] for name, array in of_questions.items()}
            self._viewed = batch, questions
        return self._views


class OnnxEncoder(CpuEncoder):
    """The encoder on ONNX Runtime."""

    session_type = OnnxSession


class OnnxDecoder(CpuDecoder):
    """The decoder on ONNX Runtime."""

    session_type = OnnxSession
