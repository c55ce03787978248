"""The encoder on a GPU: passages of several questions in, hidden states on the GPU out; tokens only, passages are not padded.

A call of few tokens is filled up to the next size that is captured into a CUDA graph: its launches would take longer than its work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cupy as cp
import numpy as np

from serving.contract.gemms import BIAS, EMBEDDING, ENCODER_KINDS, NORMS, StackSizes, encoder_gemms, gemm_features
from serving.contract.gpu_profiles import attention_tiles, calls_of_tokens, captured_calls, encoder_batch, encoder_tokens, max_tiles
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest

from .cuda_graph import CudaGraph
from .engine import LoadEngine, Scratch
from .kernels import EncoderAttention, RowKernels
from .weights import load_arrays, load_gemms, weight_bytes


@dataclasses.dataclass(frozen=True)
class CapturedCall:
    """All but the last norm of a call, as one launch.

    Attributes:
        tokens, tiles: how many it has room for.
        given: int32[tokens + 3 * tiles] on the GPU, which it reads: token ids, then the tiles of attention.
    """

    tokens: int
    tiles: int
    given: cp.ndarray
    graph: CudaGraph


class GpuEncoder:
    """The encoder's gemms with the kernels between them; not to be called from two threads at once.

    Raises:
        EngineError: if the encoder was exported as one graph.
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
            self._rows, self._attend = RowKernels(sizes), EncoderAttention(sizes, len(self._bias) // 2)
            self._allocate(sizes)
            weights = weight_bytes(self._gemms) + self._embedding.nbytes
            self.bytes = weights + scratch.bytes + sum(array.nbytes for array in self._buffers)
            # what is set up on first use is set up now
            self._captured: list[CapturedCall] = []
            self.encode([(np.ones((1, self._passage_length), np.int32),) * 2])
            if all(gemm.engine.capturable for gemm in self._gemms.values()):
                self._captured = [self._capture(tokens, encoder_batch(limits)) for tokens in captured_calls(self.max_tokens_per_call)]

    def _allocate(self, sizes: StackSizes) -> None:
        """What a call works in. A buffer holds what no two steps need at once."""
        most = self.max_tokens_per_call
        widths = {kind: gemm_features(sizes, kind) for kind in ENCODER_KINDS}
        self._residual = cp.empty((most, sizes.d_model), cp.float32)
        self._normed, self._made = (cp.empty(most * sizes.d_model, cp.float16) for _ in range(2))
        self._wide_made = cp.empty(most * max(widths["qkv"][1], widths["wi"][1]), cp.float16)
        self._wide_given = cp.empty(most * max(widths["o"][0], widths["wo"][0]), cp.float16)
        self._buffers = (self._residual, self._normed, self._made, self._wide_made, self._wide_given)

    def encode(self, batch: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[cp.ndarray]:
        """Encode the passages of several questions at once.

        Args:
            batch: (input_ids, attention_mask) a question, each int32[n_passages, passage_length]; valid tokens come first in a row.

        Returns:
            float16[n_passages, passage_length, d_model] a question, on the GPU and finished; zero where the mask is.
        """
        rows = [ids.size for ids, _ in batch]
        ends = np.cumsum(rows)
        masks = [mask * (np.arange(mask.shape[1]) < self._passage_length) for _, mask in batch]  # what is longer is cut
        flat = [np.flatnonzero(mask) for mask in masks]
        tokens = np.concatenate([ids.ravel()[valid] for (ids, _), valid in zip(batch, flat, strict=True)])
        tokens = tokens.clip(0, len(self._embedding) - 1)  # a foreign id must not max_relative_distance memory that is not the table's
        destinations = np.concatenate([valid + end - size for valid, end, size in zip(flat, ends, rows, strict=True)])
        lengths = np.concatenate([np.count_nonzero(mask, axis=1) for mask in masks])
        with self._stream:
            hidden = cp.zeros((int(ends[-1]), self.sizes.d_model), cp.float16)
            for tokens_of, lengths_of in calls_of_tokens(lengths[lengths > 0], self.max_tokens_per_call):
                self._encode_call(tokens[tokens_of], destinations[tokens_of], lengths_of, hidden)
            self._stream.synchronize()
        parts = zip(batch, ends, rows, strict=True)
        return [hidden[end - size : end].reshape(*ids.shape, self.sizes.d_model) for (ids, _), end, size in parts]

    def _encode_call(self, tokens: np.ndarray, destinations: np.ndarray, lengths: np.ndarray, hidden: cp.ndarray) -> None:
        """Encode passages that lie one after the other, each row of the result into its place of `hidden`."""
        count, tiles = len(tokens), attention_tiles(lengths)
        call = next((call for call in self._captured if count <= call.tokens and len(tiles) <= call.tiles), None)
        room = (count, len(tiles)) if call is None else (call.tokens, call.tiles)
        host = np.zeros(room[0] + 3 * room[1] + count, np.int32)
        host[:count], host[room[0] : room[0] + tiles.size], host[-count:] = tokens, tiles.ravel(), destinations
        uploaded = cp.asarray(host)
        given, places = uploaded[:-count], uploaded[-count:]
        if call is None:
            self._enqueue(given[:count], given[count:].reshape(-1, 3), int(lengths.max()))
        else:
            call.given[:] = given
            call.graph.launch(self._stream)
        made = self._made[: count * self.sizes.d_model].reshape(count, -1)
        self._rows.add_and_norm(made, self._norms[-1], self._residual[:count], hidden, places)

    def _capture(self, tokens: int, passages: int) -> CapturedCall:
        """A call of so many tokens of at most so many passages."""
        tiles = max_tiles(tokens, passages)
        given = cp.zeros(tokens + 3 * tiles, cp.int32)

        def run() -> None:
            self._enqueue(given[:tokens], given[tokens:].reshape(-1, 3), self._passage_length, context=tokens)

        run()
        self._stream.synchronize()
        return CapturedCall(tokens, tiles, given, CudaGraph(self._stream, run))

    def _enqueue(self, tokens: cp.ndarray, tiles: cp.ndarray, longest: int, context: int = 0) -> None:
        """All layers, up to what the last gemm made and the residual stream before it."""
        count, kernels = len(tokens), self._rows

        def rows(buffer: cp.ndarray, width: int) -> cp.ndarray:
            return buffer[: count * width].reshape(count, width)

        residual, normed = self._residual[:count], rows(self._normed, self.sizes.d_model)
        norms = iter(self._norms)
        kernels.embed(tokens, self._embedding, next(norms), residual, normed)
        given = normed
        for gemm, loaded in self._gemms.items():
            wide = gemm.kind in ("qkv", "wi")
            made = rows(self._wide_made if wide else self._made, gemm_features(self.sizes, gemm.kind)[1])
            loaded.enqueue(given, made, self._stream, context=context)
            if gemm.kind == "qkv":
                given = rows(self._wide_given, gemm_features(self.sizes, "o")[0])
                self._attend(made, tiles, longest, self._bias, given)
            elif gemm.kind == "wi":
                given = rows(self._wide_given, self.sizes.d_ff)
                kernels.activate(made, given)
            elif (gemm.kind, gemm.layer) != ("wo", self.sizes.num_layers - 1):
                given = normed
                kernels.add_and_norm(made, next(norms), residual, given)
