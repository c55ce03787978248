"""The CUDA kernels at the two ends of an encoder from library kernels (cuda/encoder_stream.cu), and how each is launched."""

from __future__ import annotations

import cupy as cp

from serving.contract.gemms import StackSizes
from serving.engines.gpu.kernels import compiled


class StreamKernels:
    """Token ids to the residual stream, and the stream to hidden states.

    Shapes below: `stream` float16[rows, d_model], `narrow` e4m3[rows, d_model] as uint8, `squares` float32[tiles, rows]. All launches go to
    CuPy's current stream.
    """

    def __init__(self, stack: StackSizes, *, narrow: bool, ordered: bool):
        """Compile.

        Args:
            stack: sizes of the encoder.
            narrow: whether the stream is also in 8 bits.
            ordered: whether it is there in `narrow_order`.
        """
        self._block = (-(-stack.d_model // 8 // 32) * 32,)  # a thread a vector of eight
        sizes = {"D_MODEL": stack.d_model, "EPSILON": f"{stack.epsilon!r}f"}
        module = compiled({**sizes, "NARROW": int(narrow), "ORDERED": int(ordered)}, "encoder_stream.cu")
        self._embed, self._norm = module.get_function("embed_stream"), module.get_function("norm_stream")

    def embed(
        self,
        tokens: cp.ndarray,
        embedding: cp.ndarray,
        next_norm: cp.ndarray | None,
        stream: cp.ndarray,
        narrow: cp.ndarray | None,
        squares: cp.ndarray,
    ) -> None:
        """int32[rows] by float16[vocab_size, d_model] to the stream, its sums of squares, and its copy in 8 bits times `next_norm`."""
        nothing = cp.uint64(0)
        given = nothing if next_norm is None else next_norm
        arguments = (tokens, embedding, given, cp.int32(len(squares)), stream, nothing if narrow is None else narrow, squares)
        self._embed((len(tokens),), self._block, arguments)

    def norm(self, stream: cp.ndarray, squares: cp.ndarray, weight: cp.ndarray, destinations: cp.ndarray, hidden: cp.ndarray) -> None:
        """The last norm of the first rows of `stream`, as many as int32 `destinations`, each to that row of `hidden`."""
        tiles, rows = squares.shape
        arguments = (stream, squares, cp.int32(tiles), cp.int32(rows), weight, destinations, hidden)
        self._norm((len(destinations),), self._block, arguments)
