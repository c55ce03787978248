"""Operations and bytes of a reader by arithmetic, and the shortest time that hardware of given rates needs for them.

In: a ReaderConfig and a `Workload`. Out: `Cost`s of the parts. Nothing is measured here; perf/bounds/rates.py
measures a `HardwareSpec`.

Operations are floating-point operations, two per multiply-add. The FiDO paper (de Jong et al., 2022) counts multiplications and
neglects small terms: with d = d_model = heads * d_kv and d_ff = 4 d, its encoder is 12 n d^2 L and its cross-attention keys and values
2 n d^2 L / K; `encoder_multiplications_paper` and `cross_kv_multiplications_paper` compute these.
"""

from __future__ import annotations

import dataclasses

from export.checkpoint.config import ReaderConfig, StackConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch of questions.

    Attributes:
        batch: questions answered together.
        n_passages: of each question.
        passage_length: tokens of each passage.
        new_tokens: of each answer.
    """

    batch: int
    n_passages: int
    passage_length: int
    new_tokens: int

    @property
    def encoder_tokens(self) -> int:
        """Encoded tokens of one question."""
        return self.n_passages * self.passage_length


@dataclasses.dataclass(frozen=True)
class HardwareSpec:
    """Measured rates of a processor: of a large GEMM, and of a device-to-device copy, counting bytes read and written."""

    name: str
    flops_per_s: float
    bytes_per_s: float


# bf16 GEMM of 8192^3 and copy of 8.6 GB by PyTorch
H200 = HardwareSpec("NVIDIA H200", 790e12, 4.3e12)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of one part, and the bytes that it reads or writes at least once."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    @property
    def flops_per_byte(self) -> float:
        """Arithmetic intensity."""
        return self.flops / self.bytes

    def bound_s(self, hardware: HardwareSpec) -> float:
        """The roofline bound in seconds: the longer of computing and moving."""
        return max(self.flops / hardware.flops_per_s, self.bytes / hardware.bytes_per_s)


def _feed_forward_weights(stack: StackConfig, config: ReaderConfig) -> int:
    return (3 if config.feed_forward_proj == "gated-gelu" else 2) * stack.d_model * stack.d_ff


def _attention_weights(stack: StackConfig, d_source: int) -> int:
    """Number of weights of the projections q, o, k and v; k and v project a source of width d_source."""
    return 2 * stack.d_model * stack.num_heads * stack.d_kv + _kv_weights(stack, d_source)


def _kv_weights(stack: StackConfig, d_source: int) -> int:
    return 2 * d_source * stack.num_kv_heads * stack.d_kv


def encoder_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """The encoder on all passages of the batch. Bytes: weights once, and the residual stream in and out of every layer."""
    stack, tokens = config.encoder, work.batch * work.encoder_tokens
    weights = (_attention_weights(stack, stack.d_model) + _feed_forward_weights(stack, config)) * stack.num_layers
    # scores and weighted sum: every token attends to the passage_length tokens of its passage, in every head
    attention = 2 * tokens * work.passage_length * stack.num_heads * stack.d_kv * stack.num_layers
    moved = weights + 4 * stack.num_layers * tokens * stack.d_model
    return Cost(2 * (tokens * weights + attention), moved * bytes_per_element)


def cross_kv_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """Keys and values of the encoded passages, once per question, in every layer with cross-attention."""
    tokens = work.batch * work.encoder_tokens
    weights = len(config.cross_attention_layers) * _kv_weights(config.decoder, config.encoder.d_model)
    moved = weights + tokens * config.encoder.d_model
    return Cost(2 * tokens * weights, moved * bytes_per_element + work.batch * cross_kv_bytes(config, work, bytes_per_element))


def cross_kv_bytes(config: ReaderConfig, work: Workload, bytes_per_element: int) -> int:
    """Bytes of one question's cross-attention keys and values."""
    stack = config.decoder
    return 2 * len(config.cross_attention_layers) * stack.num_kv_heads * stack.d_kv * work.encoder_tokens * bytes_per_element


def self_kv_bytes(config: ReaderConfig, tokens: float, bytes_per_element: int) -> float:
    """Bytes of the self-attention keys and values of one answer of `tokens`."""
    stack = config.decoder
    return 2 * stack.num_layers * stack.num_kv_heads * stack.d_kv * tokens * bytes_per_element


def step_weights(config: ReaderConfig) -> int:
    """Number of weights that a decoder step reads: the decoder without the cross-attention k and v projections, and the head."""
    stack = config.decoder
    cross = len(config.cross_attention_layers) * 2 * stack.d_model * stack.num_heads * stack.d_kv
    layers = (_attention_weights(stack, stack.d_model) + _feed_forward_weights(stack, config)) * stack.num_layers
    return layers + cross + config.vocab_size * stack.d_model


def step_parts(config: ReaderConfig, work: Workload, bytes_per_element: int) -> dict[str, Cost]:
    """One token for every question of the batch, halfway through the answer: weights, cross-attention and self-attention."""
    stack, past = config.decoder, work.new_tokens / 2
    heads = stack.num_heads * stack.d_kv
    weights = step_weights(config)
    return {
        "weights": Cost(2 * work.batch * weights, weights * bytes_per_element),
        "cross_attention": Cost(
            2 * work.batch * 2 * len(config.cross_attention_layers) * work.encoder_tokens * heads,
            work.batch * cross_kv_bytes(config, work, bytes_per_element),
        ),
        "self_attention": Cost(
            2 * work.batch * 2 * stack.num_layers * past * heads, work.batch * self_kv_bytes(config, past, bytes_per_element)
        ),
    }


def step_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """One decoder step: the sum of its parts."""
    parts = step_parts(config, work, bytes_per_element)
    return parts["weights"] + parts["cross_attention"] + parts["self_attention"]


def decoder_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """Complete answers of the batch: keys and values once, then every step."""
    return cross_kv_cost(config, work, bytes_per_element) + step_cost(config, work, bytes_per_element) * work.new_tokens


def encoder_multiplications_paper(config: ReaderConfig, work: Workload) -> float:
    """12 n d^2 L: the paper's count for one question, for an ungated encoder with d_ff = 4 d and passages much shorter than d."""
    return 12 * work.encoder_tokens * config.encoder.d_model**2 * config.encoder.num_layers


def cross_kv_multiplications_paper(config: ReaderConfig, work: Workload) -> float:
    """2 n d^2 L / K: the paper's count for one question, for a multi-head decoder as wide as the encoder."""
    layers = config.decoder.num_layers / config.encoder_decoder_attention_period
    return 2 * work.encoder_tokens * config.encoder.d_model**2 * layers


def largest_batch(config: ReaderConfig, work: Workload, bytes_per_element: int, memory_bytes: int, parameters: int) -> int:
    """Number of questions whose keys and values fit into memory with the weights; activations are not counted."""
    per_question = cross_kv_bytes(config, work, bytes_per_element) + self_kv_bytes(config, work.new_tokens, bytes_per_element)
    return int((memory_bytes - parameters * bytes_per_element) // per_question)
