"""The encoder on a GPU, over packed tokens.

In: token ids of passages of several questions. Out: their hidden states, on the GPU. Padding is not computed. A call of few tokens is
padded to the next size that is captured into a CUDA graph: launching its kernels one by one would take longer than running them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cupy as cp
import numpy as np

from serving.contract.call_sizes import attention_tiles, calls_of_tokens, captured_calls, encoder_batch, encoder_tokens, max_tiles
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest

from .cuda_graph import CudaGraph
from .engine import LoadEngine
from .gemm_layers import GemmLayers

# Sizes of large calls that are captured because they come again, and that are remembered to see whether they do.
MAX_REPEATED, MAX_REMEMBERED = 16, 1024


class Layers(Protocol):
    """All layers of an encoder: LibraryLayers or GemmLayers, where the arguments are explained."""

    bytes: int
    capturable: bool
    tile: int
    vocab_size: int

    def enqueue(self, tokens: cp.ndarray, tiles: cp.ndarray, longest: int, context: int = 0) -> Any:
        """Enqueue all but the last norm; returns what `finish` needs."""
        ...

    def finish(self, state: Any, destinations: cp.ndarray, hidden: cp.ndarray) -> None:
        """Enqueue the last norm, each row to its destination."""
        ...


@dataclasses.dataclass(frozen=True)
class CapturedCall:
    """An encoder call, except its last norm, as one CUDA graph.

    Attributes:
        tokens, tiles: how many it can hold.
        inputs: int32[tokens + 3 * tiles] on the GPU: token ids, then the tiles of attention.
        state: what the layers need to finish the call.
    """

    tokens: int
    tiles: int
    inputs: cp.ndarray
    graph: CudaGraph
    state: Any


class GpuEncoder:
    """The encoder's layers, by library kernels or by engines, over packed tokens. Not safe to call from two threads at once.

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
            self._layers: Layers
            if manifest.encoder_library is not None:
                from .library.layers import library_layers  # only such a reader needs apache-tvm-ffi

                self._layers = library_layers(directory, manifest, sizes, self.max_tokens_per_call)
            else:
                self._layers = GemmLayers(directory, manifest, sizes, load, self.max_tokens_per_call)
            self.bytes = self._layers.bytes
            # the first call of an engine allocates: make it now, before anything is captured
            self._captured: list[CapturedCall] = []
            self._asked: collections.Counter[tuple[int, int]] = collections.Counter()
            self._repeated: dict[tuple[int, int], CapturedCall] = {}
            self.encode([(np.ones((1, self._passage_length), np.int32),) * 2])
            if self._layers.capturable:
                for tokens in captured_calls(self.max_tokens_per_call):
                    self._captured.append(self._capture(tokens, max_tiles(tokens, encoder_batch(limits), self._layers.tile)))

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
        tokens = tokens.clip(0, self._layers.vocab_size - 1)  # an id outside the vocabulary must not read outside the table
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
        count, tiles = len(tokens), attention_tiles(lengths, self._layers.tile)
        call = next((call for call in self._captured if count <= call.tokens and len(tiles) <= call.tiles), None)
        call = call or self._repeated_call(count, len(tiles))
        padded_tokens, padded_tiles = (count, len(tiles)) if call is None else (call.tokens, call.tiles)
        host = np.zeros(padded_tokens + 3 * padded_tiles + count, np.int32)
        host[:count], host[padded_tokens : padded_tokens + tiles.size], host[-count:] = tokens, tiles.ravel(), destinations
        uploaded = cp.asarray(host)  # one copy for all three
        inputs, rows = uploaded[:-count], uploaded[-count:]
        if call is None:
            state = self._layers.enqueue(inputs[:count], inputs[count:].reshape(-1, 3), int(lengths.max()))
        else:
            call.inputs[:] = inputs
            call.graph.launch(self._stream)
            state = call.state
        self._layers.finish(state, rows, hidden)

    def _repeated_call(self, tokens: int, tiles: int) -> CapturedCall | None:
        """A large call whose size comes again, as where all passages are full: from the second one on it is captured."""
        if not self._layers.capturable:
            return None
        if len(self._asked) > MAX_REMEMBERED:
            self._asked.clear()
        self._asked[tokens, tiles] += 1
        if self._asked[tokens, tiles] == 2 and len(self._repeated) < MAX_REPEATED:
            self._repeated[tokens, tiles] = self._capture(tokens, tiles)
        return self._repeated.get((tokens, tiles))

    def _capture(self, tokens: int, tiles: int) -> CapturedCall:
        """Capture a call of `tokens` tokens in `tiles` tiles."""
        inputs = cp.zeros(tokens + 3 * tiles, cp.int32)

        def run() -> Any:
            return self._layers.enqueue(inputs[:tokens], inputs[tokens:].reshape(-1, 3), self._passage_length, context=tokens)

        state = run()
        self._stream.synchronize()
        return CapturedCall(tokens, tiles, inputs, CudaGraph(self._stream, run), state)
