"""Every tensor that crosses a boundary: between graphs, between Triton models, between server and client.

In: the sizes of a reader's engines. Out: `TensorSpec`s, from which ONNX axes, optimization profiles, sample inputs, `config.pbtxt` entries
and checks derive. The GEMMs of a GPU reader are in gemms.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# NumPy has no bfloat16: arrays hold its bits as uint16
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32, "bytes": np.object_}
TRITON_DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int32": "TYPE_INT32", "bytes": "TYPE_STRING"}


class ShapeError(ValueError):
    """An array whose dtype or shape is not that of its TensorSpec."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor at a boundary.

    Attributes:
        axes: a str axis is dynamic and has that name, an int axis has that length.
        optional: a Triton input that a request may omit.
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
        """The shape for these lengths of the dynamic axes, name -> length."""
        return tuple(lengths[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def check(self, array: np.ndarray) -> None:
        """Check the dtype, the rank and the fixed axes of `array`.

        Raises:
            ShapeError: if one differs.
        """
        wanted = NUMPY_DTYPES[self.dtype]
        fits = array.dtype == wanted and array.ndim == len(self.axes)
        fits = fits and all(isinstance(axis, str) or axis == length for axis, length in zip(self.axes, array.shape, strict=True))
        if not fits:
            raise ShapeError(f"wanted {self}, got {array.dtype}{list(array.shape)}")

    def triton(self, *, batched: bool) -> dict[str, Any]:
        """The entry of config.pbtxt; `batched` omits the first axis, as Triton does if max_batch_size is positive."""
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
    """The sizes that determine the shapes of a reader's engines; part of the manifest.

    Attributes:
        d_model_encoder: width of the hidden states.
        d_model_decoder: width of the decoder's residual stream.
        cross_attention_layers: decoder layers that have cross-attention, 0-based over the whole decoder: with 12 layers, a FiDO reader
            with cross-attention in every 6th has (5, 11).
        reads_encoder_positions: the checkpoint has a relative bias in cross-attention; the step therefore needs the position of each key
            in the padded sequence.
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
        """Bytes of the keys and values of one encoded token, over all layers with cross-attention."""
        return 2 * len(self.cross_attention_layers) * self.num_kv_heads * self.d_kv * bytes_per_element

    def self_kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of the keys and values of one generated token, over all decoder layers."""
        return 2 * self.num_decoder_layers * self.num_kv_heads * self.d_kv * bytes_per_element


def encoder_tensors(sizes: EngineSizes, dtype: str = "float32") -> GraphTensors:
    """Tensors of the encoder graph. A row is a passage: passages of several questions share a batch."""
    rows = ("passages", "passage_length")
    return GraphTensors(
        (TensorSpec("input_ids", "int32", rows), TensorSpec("attention_mask", "int32", rows)),
        (TensorSpec("encoder_hidden_states", dtype, (*rows, sizes.d_model_encoder)),),
    )


def cross_kv_tensors(sizes: EngineSizes, dtype: str = "float32") -> GraphTensors:
    """Tensors of the cross_kv graph, which runs once per question.

    It takes the question's valid hidden states, packed, and gives keys and values of the layers with cross-attention.
    """
    shape = (sizes.num_kv_heads, "encoder_sequence_length", sizes.d_kv)
    return GraphTensors(
        (TensorSpec("encoder_hidden_states", dtype, ("encoder_sequence_length", sizes.d_model_encoder)),),
        tuple(TensorSpec(f"present.{i}.encoder.{part}", dtype, shape) for i in sizes.cross_attention_layers for part in ("key", "value")),
    )


def decoder_step_tensors(sizes: EngineSizes, dtype: str = "float32", *, beams: bool = False) -> GraphTensors:
    """Tensors of the decoder_step graph, which decodes one token for a batch of sequences.

    `positions`: tokens in each sequence's self-attention cache. `encoder_lengths`: valid keys in its cross-attention cache. The graph
    ignores what the caches hold beyond them. `eos_penalty` is added to the end token's logit: 0, or a large negative number while the
    sequence may not end. `present.*`: the rows to write into the cache at `positions`. `cross_attention`: the attention weight of each
    encoded token, summed over heads and averaged over the layers with cross-attention; at position 0 it scores the passages.

    With `beams`, several sequences of the batch may belong to one question and read one row of its cross-attention cache: every tensor of
    encoded tokens has the axis `questions` in place of `batch`. `question_rows`: the sequences of each question, padded by any of the
    batch. `row_places`: where each sequence is in `question_rows`, flattened. `cross_attention` is that of a question's first sequence.
    `logits`: with the penalty; an engine computes them anyway.
    """
    owner = "questions" if beams else "batch"
    past = ("batch", sizes.num_kv_heads, "past_length", sizes.d_kv)
    encoder = (owner, sizes.num_kv_heads, "encoder_sequence_length", sizes.d_kv)
    parts = ("key", "value")
    layers = range(sizes.num_decoder_layers)
    rows = [
        TensorSpec("decoder_input_ids", "int32", ("batch",)),
        TensorSpec("positions", "int32", ("batch",)),
        TensorSpec("encoder_lengths", "int32", (owner,)),
        TensorSpec("eos_penalty", "float32", ("batch",)),
    ]
    if beams:
        rows += [TensorSpec("question_rows", "int32", ("questions", "beams")), TensorSpec("row_places", "int32", ("batch",))]
    if sizes.reads_encoder_positions:
        rows.append(TensorSpec("encoder_positions", "int32", (owner, "encoder_sequence_length")))
    rows += [TensorSpec(f"past_key_values.{i}.decoder.{part}", dtype, past) for i in layers for part in parts]
    rows += [TensorSpec(f"past_key_values.{i}.encoder.{part}", dtype, encoder) for i in sizes.cross_attention_layers for part in parts]
    new = ("batch", sizes.num_kv_heads, sizes.d_kv)
    return GraphTensors(
        tuple(rows),
        (
            TensorSpec("next_token", "int32", ("batch",)),
            TensorSpec("log_prob", "float32", ("batch",)),
            TensorSpec("cross_attention", "float32", (owner, "encoder_sequence_length")),
            *(TensorSpec(f"present.{i}.decoder.{part}", dtype, new) for i in layers for part in parts),
            *([TensorSpec("logits", "float32", ("batch", sizes.vocab_size))] if beams else []),
        ),
    )


# Request and response of a reader's model and its streaming twin. `passage_scores`: the first token's cross-attention on each passage;
# they sum to 1. `answers` and `answer_log_probs`, the best first, are sent to requests with more than one beam and to those with allowed
# answers. Over HTTP generate, Triton writes a tensor of one element as a scalar, not as a list of one.
READER_TENSORS = GraphTensors(
    (
        TensorSpec("question", "bytes", (1,)),
        TensorSpec("passages", "bytes", ("n_passages",)),
        TensorSpec("titles", "bytes", ("n_passages",), optional=True),
        TensorSpec("max_new_tokens", "int32", (1,), optional=True),
        TensorSpec("min_new_tokens", "int32", (1,), optional=True),
        TensorSpec("num_beams", "int32", (1,), optional=True),
        TensorSpec("num_answers", "int32", (1,), optional=True),
        TensorSpec("length_penalty", "float32", (1,), optional=True),
        TensorSpec("allowed_answers", "bytes", ("n_allowed_answers",), optional=True),
        TensorSpec("drop_after", "int32", (1,), optional=True),
        TensorSpec("keep_encoder_tokens", "float32", (1,), optional=True),
        TensorSpec("keep_passages", "int32", (1,), optional=True),
    ),
    (
        TensorSpec("answer", "bytes", (1,)),
        TensorSpec("log_prob", "float32", (1,)),
        TensorSpec("tokens", "int32", (1,)),
        TensorSpec("passage_scores", "float32", ("n_passages",)),
        TensorSpec("token_log_probs", "float32", ("n_tokens",)),
        TensorSpec("answers", "bytes", ("n_answers",)),
        TensorSpec("answer_log_probs", "float32", ("n_answers",)),
    ),
)
