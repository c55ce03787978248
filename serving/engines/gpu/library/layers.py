"""The encoder's layers from library kernels, compiled at export (export/library/compiler.py): no torch, no compiler, no TensorRT.

The shared objects are loaded by apache-tvm-ffi, with CuTe DSL's run-time library beside the engines. Every kernel takes addresses and
numbers (export/library/gemm.py), so a call costs the host microseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np

from serving.contract.gemms import BIAS, EMBEDDING, NORMS, StackSizes
from serving.contract.library_kernels import (
    HOPPER,
    KINDS,
    NARROW_NORMS,
    RUNTIME_FILE,
    SCALES,
    EncoderKernel,
    EncoderLibrary,
    gemm_widths,
    sum_tiles,
    weight_file,
)
from serving.contract.manifest import EngineError, Manifest
from serving.engines.gpu.hopper_attention import HopperAttention, attention_for
from serving.engines.gpu.kernels import EncoderAttention
from serving.engines.gpu.weights import load_array, load_arrays

from .stream_kernels import StreamKernels

FUNCTION = "func"  # what an object exports
Launch = Callable[..., Any]


def load_kernels(directory: Path, library: EncoderLibrary) -> dict[EncoderKernel, Launch]:
    """The kernels' functions.

    Raises:
        EngineError: if they are for other cards, or apache-tvm-ffi or a file is missing.
    """
    here = cp.cuda.Device().compute_capability
    if library.compute_capability.replace(".", "") != here:
        raise EngineError(
            f"{directory}: kernels compiled for {library.architecture}, the card here is sm_{here}; `make export` makes others"
        )
    try:
        import tvm_ffi
    except ImportError as error:
        raise EngineError(f"{directory}: library kernels need apache-tvm-ffi, which is not installed ({error})") from error
    try:
        ctypes.CDLL(str(directory / RUNTIME_FILE), mode=ctypes.RTLD_GLOBAL)  # the objects' undefined symbols are found in it
        return {kernel: tvm_ffi.load_module(str(directory / kernel.file))[FUNCTION] for kernel in library.kernels}
    except (OSError, RuntimeError) as error:
        raise EngineError(f"{directory}: a library kernel cannot be loaded: {error}") from error


class LibraryLayers:
    """All layers of an encoder, over packed tokens.

    Args:
        stack: its sizes.
        library: which kernels there are.
        kernels: of `load_kernels`.
        arrays: on the GPU: "embedding" float16[vocab_size, d_model], "norm" float32[d_model] (the last one), "bias" float32[distances,
            num_heads], weights by `weight_file`, and of FP8 NARROW_NORMS and, on the host, SCALES.
        attention: takes the queries, keys and values; writes what the library's `attended` says.
        most_tokens: of a call.
    """

    capturable = True

    def __init__(
        self,
        stack: StackSizes,
        library: EncoderLibrary,
        kernels: Mapping[EncoderKernel, Launch],
        arrays: Mapping[str, Any],
        attention: EncoderAttention | HopperAttention,
        most_tokens: int,
    ):
        self._stack, self._library, self._kernels, self._attend = stack, library, kernels, attention
        self._narrow = library.precision == "float8"
        self._rows = StreamKernels(stack, narrow=self._narrow, ordered=library.architecture == HOPPER)
        self._embedding, self._norm, self._bias = arrays["embedding"], arrays["norm"], arrays["bias"]
        self.tile, self.vocab_size = attention.tile, len(self._embedding)
        self._weights = {(kind, layer): arrays[weight_file(kind, layer)] for layer in range(stack.num_layers) for kind in KINDS}
        self._scales = arrays[SCALES] if self._narrow else np.ones((stack.num_layers, len(KINDS), 2), np.float32)
        self._next_norms = arrays[NARROW_NORMS] if self._narrow else None
        self._multiprocessors = cp.cuda.Device().attributes["MultiProcessorCount"]
        widest = max(gemm_widths(stack, "qkv")[1], stack.d_ff)
        self._stream = cp.empty((most_tokens, stack.d_model), cp.float16)
        self._narrow_stream = cp.empty((most_tokens, stack.d_model), cp.uint8) if self._narrow else None
        self._wide = cp.empty(most_tokens * widest, cp.float16)  # queries, keys and values, and later what wo reads
        attended_type = cp.uint8 if library.attended == "float8" else cp.float16
        self._attended = cp.empty((most_tokens, stack.num_heads * stack.d_kv), attended_type)
        most_tiles = max([1, *(sum_tiles(stack, kernel.tiling) for kernel in library.kernels)])
        self._squares = cp.empty(most_tiles * most_tokens, cp.float32)
        buffers = (self._stream, self._narrow_stream, self._wide, self._attended, self._squares)
        self.bytes = self._embedding.nbytes + sum(a.nbytes for a in (*self._weights.values(), *buffers) if a is not None)

    def enqueue(self, tokens: cp.ndarray, tiles: cp.ndarray, longest: int, context: int = 0) -> tuple[int, int]:
        """All layers, on the current stream.

        Args:
            tokens: int32[rows], of passages that lie one after the other.
            tiles: of the attention kernel.
            longest: tokens of the longest passage.
            context: of an engine's calls; nothing here.

        Returns:
            Rows, and how many sums of squares each has at the end: for `finish`.
        """
        rows, stack, wide = len(tokens), self._stack, self._wide
        summed = 1
        self._rows.embed(tokens, self._embedding, self._next_norm(0), self._stream, self._narrow_stream, self._sums(summed, rows))
        query_key_value = wide[: rows * gemm_widths(stack, "qkv")[1]].reshape(rows, -1)
        attended = self._attended[:rows]
        for layer in range(stack.num_layers):
            last = layer == stack.num_layers - 1
            self._multiply("qkv", layer, rows, self._operand, query_key_value, summed)
            self._attend(query_key_value, tiles, longest, self._bias, attended, **self._attended_scale(layer))
            summed = self._multiply("o", layer, rows, attended, self._stream, 0, following=2 * layer + 1)
            self._multiply("wi", layer, rows, self._operand, wide, summed)
            summed = self._multiply("wo", layer, rows, wide, self._stream, 0, following=None if last else 2 * layer + 2)
        return rows, summed

    def finish(self, state: tuple[int, int], destinations: cp.ndarray, hidden: cp.ndarray) -> None:
        """The last norm: the first rows of the call to those rows of float16 `hidden` that int32 `destinations` names."""
        rows, summed = state
        self._rows.norm(self._stream, self._sums(summed, rows), self._norm, destinations, hidden)

    def _attended_scale(self, layer: int) -> dict[str, float]:
        """For an attention kernel that writes e4m3."""
        return {"scale": float(self._scales[layer, 0, 1])} if self._library.attended == "float8" else {}

    @property
    def _operand(self) -> cp.ndarray:
        """The stream as the GEMMs read it."""
        return self._stream if self._narrow_stream is None else self._narrow_stream

    def _next_norm(self, index: int) -> cp.ndarray | None:
        return None if self._next_norms is None else self._next_norms[index]

    def _sums(self, tiles: int, rows: int) -> cp.ndarray:
        return self._squares[: tiles * rows].reshape(tiles, rows)

    def _multiply(self, kind: str, layer: int, rows: int, x: cp.ndarray, out: cp.ndarray, summed: int, following: int | None = None) -> int:
        """Enqueue one GEMM; gives how many sums of squares a row it wrote. `following` is the index of the norm that comes next."""
        narrow = self._narrow and following is not None
        kernel = self._library.choose(kind, rows, narrow=narrow)
        alpha, beta = self._scales[layer, KINDS.index(kind)]
        squares = self._squares.data.ptr
        self._kernels[kernel](
            x.data.ptr,
            self._weights[kind, layer].data.ptr,
            out.data.ptr,
            self._stream.data.ptr,
            self._narrow_stream.data.ptr if narrow and self._narrow_stream is not None else 0,
            self._next_norms[following].data.ptr if narrow and self._next_norms is not None else 0,
            squares,
            squares,
            float(alpha),
            float(beta),
            rows,
            summed,
            self._multiprocessors // kernel.tiling.cluster_size,
            cp.cuda.get_current_stream().ptr,
        )
        return sum_tiles(self._stack, kernel.tiling)


def library_layers(directory: Path, manifest: Manifest, stack: StackSizes, most_tokens: int) -> LibraryLayers:
    """The layers of a reader's encoder from its verified files.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if its kernels cannot run here.
    """
    library = manifest.encoder_library
    assert library is not None
    narrow = library.precision == "float8"
    weights = tuple(weight_file(kind, layer) for layer in range(stack.num_layers) for kind in KINDS)
    with manifest.verified(directory, (RUNTIME_FILE, *(kernel.file for kernel in library.kernels))):
        kernels = load_kernels(directory, library)
    embedding, norms, bias = load_arrays(directory, manifest, "encoder", (EMBEDDING, NORMS, BIAS))
    arrays: dict[str, Any] = {"embedding": embedding, "norm": norms[-1], "bias": bias}
    for file in (*weights, *((NARROW_NORMS,) if narrow else ())):
        arrays[file] = load_array(directory, manifest, file)
    if narrow:
        arrays[SCALES] = load_array(directory, manifest, SCALES).get()
    reach, longest = len(bias) // 2, manifest.prompt.passage_length
    if library.attended == "float16":
        return LibraryLayers(stack, library, kernels, arrays, attention_for(stack, reach, longest), most_tokens)
    if not HopperAttention.serves(stack, longest):
        raise EngineError(f"{directory}: no attention kernel here writes {library.attended}; export with --attended float16")
    return LibraryLayers(stack, library, kernels, arrays, HopperAttention(stack, reach, fp8=True), most_tokens)
