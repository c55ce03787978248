"""The encoder on a GPU: passages of several questions in, hidden states on the GPU out; tokens only, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cupy as cp
import numpy as np

from .gpu_engine import LoadEngine, Scratch
from .gpu_kernels import EncoderAttention, RowKernels
from .gpu_plan import attention_tiles, calls_of_tokens, encoder_tokens
from .gpu_products import load_arrays, load_products, weight_bytes
from .limits import Limits
from .manifest import EngineError, Manifest
from .products import BIAS, EMBEDDING, ENCODER_KINDS, NORMS, StackSizes, encoder_products, product_widths


class GpuEncoder:
    """The encoder's products with the kernels between them; not to be called from two threads at once.

    Raises:
        EngineError: if the encoder was exported as one graph.
    """

    def __init__(self, directory: Path, manifest: Manifest, load: LoadEngine, limits: Limits):
        if manifest.encoder is None:
            raise EngineError(f"{directory}: the encoder is one graph, for Triton's own backend; export it without --whole-encoder")
        sizes = self.sizes = manifest.encoder
        self._passage_length = manifest.prompt.passage_length
        self.most_tokens = encoder_tokens(limits, self._passage_length)
        self._stream = cp.cuda.Stream(non_blocking=True)
        with self._stream:
            scratch = Scratch()
            self._products = load_products(directory, manifest, sizes, encoder_products(sizes), load, scratch)
            self._embedding, self._norms, self._bias = load_arrays(directory, manifest, "encoder", (EMBEDDING, NORMS, BIAS))
            self._rows, self._attend = RowKernels(sizes), EncoderAttention(sizes, len(self._bias) // 2)
            self._allocate(sizes)
            weights = weight_bytes(self._products) + self._embedding.nbytes
            self.bytes = weights + scratch.bytes + sum(array.nbytes for array in self._buffers)
            # what is set up on first use is set up now
            self.encode([(np.ones((1, self._passage_length), np.int32),) * 2])

    def _allocate(self, sizes: StackSizes) -> None:
        """What a call works in. A buffer holds what no two steps need at once."""
        most = self.most_tokens
        widths = {kind: product_widths(sizes, kind) for kind in ENCODER_KINDS}
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
        tokens = tokens.clip(0, len(self._embedding) - 1)  # a foreign id must not reach memory that is not the table's
        destinations = np.concatenate([valid + end - size for valid, end, size in zip(flat, ends, rows, strict=True)])
        lengths = np.concatenate([np.count_nonzero(mask, axis=1) for mask in masks])
        with self._stream:
            hidden = cp.zeros((int(ends[-1]), self.sizes.d_model), cp.float16)
            for tokens_of, lengths_of in calls_of_tokens(lengths[lengths > 0], self.most_tokens):
                self._encode_call(tokens[tokens_of], destinations[tokens_of], lengths_of, hidden)
            self._stream.synchronize()
        parts = zip(batch, ends, rows, strict=True)
        return [hidden[end - size : end].reshape(*ids.shape, self.sizes.d_model) for (ids, _), end, size in parts]

    def _encode_call(self, tokens: np.ndarray, destinations: np.ndarray, lengths: np.ndarray, hidden: cp.ndarray) -> None:
        """Encode passages that lie one after the other, each row of the result into its place of `hidden`."""
        count, kernels = len(tokens), self._rows
        tiles = attention_tiles(lengths)
        uploaded = cp.asarray(np.concatenate([tokens, destinations, tiles.ravel()]).astype(np.int32))
        on_gpu, places, tiles = uploaded[:count], uploaded[count : 2 * count], uploaded[2 * count :].reshape(-1, 3)

        def rows(buffer: cp.ndarray, width: int) -> cp.ndarray:
            return buffer[: count * width].reshape(count, width)

        residual, normed = self._residual[:count], rows(self._normed, self.sizes.d_model)
        norms = iter(self._norms)
        kernels.embed(on_gpu, self._embedding, next(norms), residual, normed)
        given = normed
        for product, loaded in self._products.items():
            wide = product.kind in ("qkv", "wi")
            made = rows(self._wide_made if wide else self._made, product_widths(self.sizes, product.kind)[1])
            loaded.enqueue(given, made, self._stream)
            if product.kind == "qkv":
                given = rows(self._wide_given, product_widths(self.sizes, "o")[0])
                self._attend(made, tiles, int(lengths.max()), self._bias, given)
            elif product.kind == "wi":
                given = rows(self._wide_given, self.sizes.d_ff)
                kernels.activate(made, given)
            elif (product.kind, product.layer) == ("wo", self.sizes.num_layers - 1):
                kernels.add_and_norm(made, next(norms), residual, hidden, places)
            else:
                given = normed
                kernels.add_and_norm(made, next(norms), residual, given)
