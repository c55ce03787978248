"""The encoder's layers by engines: one call per GEMM, with small kernels between them. Runs on every GPU that an engine runs on."""

from __future__ import annotations

from pathlib import Path

import cupy as cp

from serving.contract.gemms import BIAS, EMBEDDING, ENCODER_KINDS, NORMS, StackSizes, encoder_gemms, gemm_features
from serving.contract.manifest import Manifest

from .engine import LoadEngine, Scratch
from .hopper_attention import attention_for
from .kernels import RowKernels
from .weights import load_arrays, load_gemms, weight_bytes


class GemmLayers:
    """All layers of an encoder, over packed tokens.

    Args:
        directory: of the engines.
        manifest: of the engines.
        stack: sizes of the encoder.
        load: loads an engine by its name.
        max_tokens: of the largest call.

    Attributes:
        capturable: whether a call may be captured into a CUDA graph.
        tile: queries of an entry of `attention_tiles`.
        vocab_size: token ids must be less.
        bytes: device memory of all of it.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if an engine cannot run here.
    """

    def __init__(self, directory: Path, manifest: Manifest, stack: StackSizes, load: LoadEngine, max_tokens: int):
        scratch = Scratch()
        self._stack = stack
        self._gemms = load_gemms(directory, manifest, stack, encoder_gemms(stack), load, scratch)
        self._embedding, self._norms, self._bias = load_arrays(directory, manifest, "encoder", (EMBEDDING, NORMS, BIAS))
        self._rows = RowKernels(stack)
        self._attend = attention_for(stack, len(self._bias) // 2, manifest.prompt.passage_length)
        self.tile, self.vocab_size = self._attend.tile, len(self._embedding)
        self.capturable = all(gemm.engine.capturable for gemm in self._gemms.values())
        # a buffer is reused once its content is no longer needed
        widths = {kind: gemm_features(stack, kind) for kind in ENCODER_KINDS}
        self._residual = cp.empty((max_tokens, stack.d_model), cp.float32)
        self._normed, self._output = (cp.empty(max_tokens * stack.d_model, cp.float16) for _ in range(2))
        self._wide_output = cp.empty(max_tokens * max(widths["qkv"][1], widths["wi"][1]), cp.float16)
        self._wide_input = cp.empty(max_tokens * max(widths["o"][0], widths["wo"][0]), cp.float16)
        buffers = (self._residual, self._normed, self._output, self._wide_output, self._wide_input)
        self.bytes = weight_bytes(self._gemms) + self._embedding.nbytes + scratch.bytes + sum(array.nbytes for array in buffers)

    def enqueue(self, tokens: cp.ndarray, tiles: cp.ndarray, longest: int, context: int = 0) -> None:
        """Enqueue all layers on the current stream.

        The last GEMM's output stays in `_output`; adding it to `_residual` and the last norm are left to `finish`.

        Args:
            tokens: int32[tokens], packed.
            tiles: of `attention_tiles`, on the GPU.
            longest: tokens of the longest passage.
            context: of the engines' calls; a call that is captured has its own.
        """
        count, kernels = len(tokens), self._rows

        def rows(buffer: cp.ndarray, width: int) -> cp.ndarray:
            return buffer[: count * width].reshape(count, width)

        stream = cp.cuda.get_current_stream()
        residual, normed = self._residual[:count], rows(self._normed, self._stack.d_model)
        norms = iter(self._norms)
        kernels.embed(tokens, self._embedding, next(norms), residual, normed)
        x = normed  # the input of the next GEMM
        for gemm, loaded in self._gemms.items():
            wide = gemm.kind in ("qkv", "wi")
            y = rows(self._wide_output if wide else self._output, gemm_features(self._stack, gemm.kind)[1])
            loaded.enqueue(x, y, stream, context=context)
            if gemm.kind == "qkv":
                x = rows(self._wide_input, gemm_features(self._stack, "o")[0])
                self._attend(y, tiles, longest, self._bias, x)
            elif gemm.kind == "wi":
                x = rows(self._wide_input, self._stack.d_ff)
                kernels.activate(y, x)
            elif (gemm.kind, gemm.layer) != ("wo", self._stack.num_layers - 1):
                x = normed
                kernels.add_and_norm(y, next(norms), residual, x)

    def finish(self, state: None, destinations: cp.ndarray, hidden: cp.ndarray) -> None:
        """Enqueue the last norm: the first rows of the call to those rows of float16 `hidden` that int32 `destinations` names."""
        count = len(destinations)
        output = self._output[: count * self._stack.d_model].reshape(count, -1)
        self._rows.add_and_norm(output, self._norms[-1], self._residual[:count], hidden, destinations)
