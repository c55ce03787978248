"""The encoder on a GPU: GEMMs with kernels between them, over packed tokens.

In: token ids of passages of several questions. Out: their hidden states, on the GPU. Padding is not computed. A call of few tokens is
padded to the next size that is captured into a CUDA graph: launching its kernels one by one would take longer than running them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cupy as cp
import numpy as np

from serving.contract.call_sizes import attention_tiles, calls_of_tokens, captured_calls, encoder_batch, encoder_tokens, max_tiles
from serving.contract.gemms import BIAS, EMBEDDING, ENCODER_KINDS, NORMS, StackSizes, encoder_gemms, gemm_features
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest

from .cuda_graph import CudaGraph
from .engine import LoadEngine, Scratch
from .kernels import EncoderAttention, RowKernels
from .weights import load_arrays, load_gemms, weight_bytes


@dataclasses.dataclass(frozen=True)
class CapturedCall:
    """An encoder call, except its last norm, as one CUDA graph.

    Attributes:
        tokens, tiles: how many it can hold.
        inputs: int32[tokens + 3 * tiles] on the GPU: token ids, then the tiles of attention.
    """

    tokens: int
    tiles: int
    inputs: cp.ndarray
    graph: CudaGraph


class GpuEncoder:
    """The GEMMs of the encoder with the kernels between them. Not safe to call from two threads at once.

    Args:
        directory: of the engines.
        manifest: of the engines.
        load: loads an engine by its name.
        limits: bounds of a call.

    Attributes:
        max_tokens_per_call: tokens of the largest call; more are encoded in several calls.
        bytes: device memory of all of it.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if the encoder is one graph, or an engine cannot run here.
    """

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, limits: Limits):
        if manifest.encoder is None:
            raise EngineError(f"{directory}: the encoder is one graph, for Triton's own backend; export it without --whole-encoder")
        sizes = self.sizes = manifest.encoder
        self._passage_length = manifest.prompt.passage_length
        self.max_tokens_per_call = encoder_tokens(limits, self._passage_length)
        self._stream = cp.cuda.Stream(non_blocking=True)
        with self._stream:
            scratch = Scratch()
            self._gemms = load_gemms(directory, manifest, sizes, encoder_gemms(sizes), load, scratch)
            self._embedding, self._norms, self._bias = load_arrays(directory, manifest, "encoder", (EMBEDDING, NORMS, BIAS))
            self._rows, self._attend = RowKernels(sizes), EncoderAttention(sizes, len(self._bias) // 2, self._passage_length)
            self._allocate(sizes)
            weights = weight_bytes(self._gemms) + self._embedding.nbytes
            self.bytes = weights + scratch.bytes + sum(array.nbytes for array in self._buffers)
            # the first call of an engine allocates: make it now, before anything is captured
            self._captured: list[CapturedCall] = []
            self.encode([(np.ones((1, self._passage_length), np.int32),) * 2])
            if all(gemm.engine.capturable for gemm in self._gemms.values()):
                self._captured = [self._capture(tokens, encoder_batch(limits)) for tokens in captured_calls(self.max_tokens_per_call)]

    def _allocate(self, sizes: StackSizes) -> None:
        """Allocate the buffers of a call. A buffer is reused once its content is no longer needed."""
        tokens = self.max_tokens_per_call
        widths = {kind: gemm_features(sizes, kind) for kind in ENCODER_KINDS}
        self._residual = cp.empty((tokens, sizes.d_model), cp.float32)
        self._normed, self._output = (cp.empty(tokens * sizes.d_model, cp.float16) for _ in range(2))
        self._wide_output = cp.empty(tokens * max(widths["qkv"][1], widths["wi"][1]), cp.float16)
        self._wide_input = cp.empty(tokens * max(widths["o"][0], widths["wo"][0]), cp.float16)
        self._buffers = (self._residual, self._normed, self._output, self._wide_output, self._wide_input)

    def encode(self, batch: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[cp.ndarray]:
        """Encode the passages of several questions at once; arguments as Encoder.encode.

        A passage of more than the reader's passage_length tokens is truncated.

        Returns:
            float16[n_passages, passage_length, d_model] of each question, on the GPU and finished; zero where the mask is.
        """
        rows = [ids.size for ids, _ in batch]
        ends = np.cumsum(rows)
        masks = [mask * (np.arange(mask.shape[1]) < self._passage_length) for _, mask in batch]
        flat = [np.flatnonzero(mask) for mask in masks]
        tokens = np.concatenate([ids.ravel()[valid] for (ids, _), valid in zip(batch, flat, strict=True)])
        tokens = tokens.clip(0, len(self._embedding) - 1)  # an id outside the vocabulary must not read outside the table
        destinations = np.concatenate([valid + end - size for valid, end, size in zip(flat, ends, rows, strict=True)])
        lengths = np.concatenate([np.count_nonzero(mask, axis=1) for mask in masks])
        with self._stream:
            hidden = cp.zeros((int(ends[-1]), self.sizes.d_model), cp.float16)
            for tokens_of, lengths_of in calls_of_tokens(lengths[lengths > 0], self.max_tokens_per_call):
                self._encode_call(tokens[tokens_of], destinations[tokens_of], lengths_of, hidden)
            self._stream.synchronize()
        questions = zip(batch, ends, rows, strict=True)
        return [hidden[end - size : end].reshape(*ids.shape, self.sizes.d_model) for (ids, _), end, size in questions]

    def _encode_call(self, tokens: np.ndarray, destinations: np.ndarray, lengths: np.ndarray, hidden: cp.ndarray) -> None:
        """Encode packed passages; write the hidden state of token i to row destinations[i] of `hidden`."""
        count, tiles = len(tokens), attention_tiles(lengths)
        call = next((call for call in self._captured if count <= call.tokens and len(tiles) <= call.tiles), None)
        padded_tokens, padded_tiles = (count, len(tiles)) if call is None else (call.tokens, call.tiles)
        host = np.zeros(padded_tokens + 3 * padded_tiles + count, np.int32)
        host[:count], host[padded_tokens : padded_tokens + tiles.size], host[-count:] = tokens, tiles.ravel(), destinations
        uploaded = cp.asarray(host)  # one copy for all three
        inputs, rows = uploaded[:-count], uploaded[-count:]
        if call is None:
            self._enqueue(inputs[:count], inputs[count:].reshape(-1, 3), int(lengths.max()))
        else:
            call.inputs[:] = inputs
            call.graph.launch(self._stream)
        output = self._output[: count * self.sizes.d_model].reshape(count, -1)
        self._rows.add_and_norm(output, self._norms[-1], self._residual[:count], hidden, rows)

    def _capture(self, tokens: int, passages: int) -> CapturedCall:
        """Capture a call of `tokens` tokens in at most `passages` passages."""
        tiles = max_tiles(tokens, passages)
        inputs = cp.zeros(tokens + 3 * tiles, cp.int32)

        def run() -> None:
            self._enqueue(inputs[:tokens], inputs[tokens:].reshape(-1, 3), self._passage_length, context=tokens)

        run()
        self._stream.synchronize()
        return CapturedCall(tokens, tiles, inputs, CudaGraph(self._stream, run))

    def _enqueue(self, tokens: cp.ndarray, tiles: cp.ndarray, longest: int, context: int = 0) -> None:
        """Enqueue all layers. The last GEMM's output stays in `_output`; adding it to `_residual` and the last norm are left to do."""
        count, kernels = len(tokens), self._rows

        def rows(buffer: cp.ndarray, width: int) -> cp.ndarray:
            return buffer[: count * width].reshape(count, width)

        residual, normed = self._residual[:count], rows(self._normed, self.sizes.d_model)
        norms = iter(self._norms)
        kernels.embed(tokens, self._embedding, next(norms), residual, normed)
        x = normed  # the input of the next GEMM
        for gemm, loaded in self._gemms.items():
            wide = gemm.kind in ("qkv", "wi")
            y = rows(self._wide_output if wide else self._output, gemm_features(self.sizes, gemm.kind)[1])
            loaded.enqueue(x, y, self._stream, context=context)
            if gemm.kind == "qkv":
                x = rows(self._wide_input, gemm_features(self.sizes, "o")[0])
                self._attend(y, tiles, longest, self._bias, x)
            elif gemm.kind == "wi":
                x = rows(self._wide_input, self.sizes.d_ff)
                kernels.activate(y, x)
            elif (gemm.kind, gemm.layer) != ("wo", self.sizes.num_layers - 1):
                x = normed
                kernels.add_and_norm(y, next(norms), residual, x)
