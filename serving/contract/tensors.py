"""The one source of every tensor that crosses a boundary: between graphs, between Triton models, between server and client.

Comes in: an engine's sizes. Goes out: `TensorSpec`s, from which ONNX axes, sample inputs, `config.pbtxt` entries and checks derive.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# NumPy has no bfloat16: the bits travel as integers
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32, "bytes": np.object_}
TRITON_DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int32": "TYPE_INT32", "bytes": "TYPE_STRING"}


class ShapeError(ValueError):
    """An array whose dtype or shape is not that of its TensorSpec."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor at a boundary: a str axis is dynamic and named, an int axis is fixed.

    `optional` is for Triton inputs that a request may leave out.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.axes))}]"

    def dynamic_axes(self) -> dict[int, str]:
        """Position -> name of the dynamic axes."""
        return {i: axis for i, axis in enumerate(self.axes) if isinstance(axis, str)}

    def shape(self, lengths: dict[str, int]) -> tuple[int, ...]:
        """The shape once every dynamic axis has a length."""
        return tuple(lengths[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def check(self, array: np.ndarray) -> None:
        """Raise ShapeError unless `array` has this dtype, rank and these fixed axes."""
        wanted = NUMPY_DTYPES[self.dtype]
        fits = array.dtype == wanted and array.ndim == len(self.axes)
        fits = fits and all(isinstance(axis, str) or axis == length for axis, length in zip(self.axes, array.shape, strict=True))
        if not fits:
            raise ShapeError(f"wanted {self}, got {array.dtype}{list(array.shape)}")

    def triton(self, *, batched: bool) -> dict[str, Any]:
        """The entry of config.pbtxt; `batched` leaves out the first axis, as Triton does where max_batch_size is positive."""
        axes = self.axes[1:] if batched else self.axes
        entry: dict[str, Any] = {
            "name": self.name,
            "data_type": TRITON_DTYPES[self.dtype],
            "dims": [-1 if isinstance(axis, str) else axis for axis in axes],
        }
        return entry | ({"optional": True} if self.optional else {})


@dataclasses.dataclass(frozen=True)
class GraphTensors:
    """Inputs and outputs of one graph or Triton model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """What the shapes of a reader's engines depend on; travels in the manifest.

    Attributes:
        d_model_encoder: width of the hidden states.
        d_model_decoder: width of the decoder's residual stream.
        cross_attention_layers: decoder layers that have cross-attention, 0-based over the whole decoder.
        reads_encoder_positions: the checkpoint has a relative bias in cross-attention, so the step needs each key's place in the
            padded sequence.
    """

    d_model_encoder: int
    d_model_decoder: int
    num_decoder_layers: int
    cross_attention_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    d_kv: int
    vocab_size: int
    reads_encoder_positions: bool = False

    def cross_kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of keys and values that one encoded token costs, over all cross-attending layers."""
        return 2 * len(self.cross_attention_layers) * self.num_kv_heads * self.d_kv * bytes_per_element

    def self_kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of keys and values that one generated token costs, over all decoder layers."""
        return 2 * self.num_decoder_layers * self.num_kv_heads * self.d_kv * bytes_per_element


def encoder_tensors(sizes: EngineSizes, dtype: str = "float32") -> GraphTensors:
    """The encoder graph: a passage is a row, so that passages of several questions fill one batch."""
    rows = ("passages", "passage_length")
    return GraphTensors(
        (TensorSpec("input_ids", "int32", rows), TensorSpec("attention_mask", "int32", rows)),
        (TensorSpec("encoder_hidden_states", dtype, (*rows, sizes.d_model_encoder)),),
    )


def cross_kv_tensors(sizes: EngineSizes, dtype: str = "float32") -> GraphTensors:
    """The cross_kv graph, run once a question: its valid hidden states, packed, to keys and values of the cross-attending layers."""
    shape = (sizes.num_kv_heads, "encoder_sequence_length", sizes.d_kv)
    return GraphTensors(
        (TensorSpec("encoder_hidden_states", dtype, ("encoder_sequence_length", sizes.d_model_encoder)),),
        tuple(TensorSpec(f"present.{i}.encoder.{part}", dtype, shape) for i in sizes.cross_attention_layers for part in ("key", "value")),
    )


def decoder_step_tensors(sizes: EngineSizes, dtype: str = "float32") -> GraphTensors:
    """The decoder_step graph: one token for a batch of running answers.

    `positions` holds how many tokens each row has in its self-attention cache, `encoder_lengths` how many of its cross-attention keys
    are valid; what lies beyond in the caches is not looked at. `eos_penalty` is added to the end token's logit: 0, or a large negative
    number where the answer must go on. `present.*` are the rows to append to the cache at `positions`. `cross_attention` is the weight
    that each encoded token got, summed over heads and averaged over the cross-attending layers: at position 0, what the answer rests on.
    """
    past = ("batch", sizes.num_kv_heads, "past_length", sizes.d_kv)
    encoder = ("batch", sizes.num_kv_heads, "encoder_sequence_length", sizes.d_kv)
    parts = ("key", "value")
    layers = range(sizes.num_decoder_layers)
    rows = [
        TensorSpec("decoder_input_ids", "int32", ("batch",)),
        TensorSpec("positions", "int32", ("batch",)),
        TensorSpec("encoder_lengths", "int32", ("batch",)),
        TensorSpec("eos_penalty", "float32", ("batch",)),
    ]
    if sizes.reads_encoder_positions:
        rows.append(TensorSpec("encoder_positions", "int32", ("batch", "encoder_sequence_length")))
    rows += [TensorSpec(f"past_key_values.{i}.decoder.{part}", dtype, past) for i in layers for part in parts]
    rows += [TensorSpec(f"past_key_values.{i}.encoder.{part}", dtype, encoder) for i in sizes.cross_attention_layers for part in parts]
    new = ("batch", sizes.num_kv_heads, sizes.d_kv)
    return GraphTensors(
        tuple(rows),
        (
            TensorSpec("next_token", "int32", ("batch",)),
            TensorSpec("log_prob", "float32", ("batch",)),
            TensorSpec("cross_attention", "float32", ("batch", "encoder_sequence_length")),
            *(TensorSpec(f"present.{i}.decoder.{part}", dtype, new) for i in layers for part in parts),
        ),
    )


# What a client of `fid` and `fido` sends and gets; fid_stream and fido_stream take the same.
READER_TENSORS = GraphTensors(
    (
        TensorSpec("question", "bytes", (1,)),
        TensorSpec("passages", "bytes", ("n_passages",)),
        TensorSpec("titles", "bytes", ("n_passages",), optional=True),
        TensorSpec("max_new_tokens", "int32", (1,), optional=True),
        TensorSpec("min_new_tokens", "int32", (1,), optional=True),
    ),
    (
        TensorSpec("answer", "bytes", (1,)),
        TensorSpec("log_prob", "float32", (1,)),
        TensorSpec("tokens", "int32", (1,)),
        TensorSpec("passage_scores", "float32", ("n_passages",)),
        TensorSpec("token_log_probs", "float32", ("n_tokens",)),
    ),
)
