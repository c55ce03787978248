"""What a reader costs by arithmetic alone: operations, bytes, and the time below which no machine with given rates can answer.

Comes in: a ReaderConfig and a `Workload`. Goes out: `Cost`s of the parts. Nothing is measured here; the rates of a `HardwareSpec` are.

Operations are floating-point operations, two for each multiply-add. The FiDO paper (de Jong et al., 2022) counts multiplications and
drops what is small: with d = d_model = heads * d_kv and d_ff = 4 d, its encoder is 12 n d^2 L and its cross-attention keys and values
2 n d^2 L / K; `encoder_multiplications_paper` and `cross_kv_multiplications_paper` are those.
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
    """A processor's rates, as measured: a large matrix product, and a device-to-device copy counting bytes read and written."""

    name: str
    flops_per_s: float
    bytes_per_s: float


# bf16 product of 8192^3 and copy of 8.6 GB through PyTorch
H200 = HardwareSpec("NVIDIA H200", 790e12, 4.3e12)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of one part, and the bytes it must read or write at least once."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    @property
    def flops_per_byte(self) -> float:
        """Operational intensity."""
        return self.flops / self.bytes

    def bound_s(self, card: HardwareSpec) -> float:
        """Time below which the card cannot do it: the slower of computing and moving."""
        return max(self.flops / card.flops_per_s, self.bytes / card.bytes_per_s)


def _feed_forward_weights(stack: StackConfig, config: ReaderConfig) -> int:
    return (3 if config.feed_forward_proj == "gated-gelu" else 2) * stack.d_model * stack.d_ff


def _attention_weights(stack: StackConfig, d_source: int) -> int:
    """Weights of q and o, and of k and v, which read a source of width d_source."""
    return 2 * stack.d_model * stack.num_heads * stack.d_kv + _kv_weights(stack, d_source)


def _kv_weights(stack: StackConfig, d_source: int) -> int:
    return 2 * d_source * stack.num_kv_heads * stack.d_kv


def encoder_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """All passages of the batch through the encoder. Bytes: weights once, and the residual stream in and out of every layer."""
    stack, tokens = config.encoder, work.batch * work.encoder_tokens
    weights = (_attention_weights(stack, stack.d_model) + _feed_forward_weights(stack, config)) * stack.num_layers
    # scores and mixing: every token meets the passage_length tokens of its own passage, in every head
    attention = 2 * tokens * work.passage_length * stack.num_heads * stack.d_kv * stack.num_layers
    moved = weights + 4 * stack.num_layers * tokens * stack.d_model
    return Cost(2 * (tokens * weights + attention), moved * bytes_per_element)


def cross_kv_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """Keys and values of the encoded passages, once a question, in every cross-attending layer."""
    tokens = work.batch * work.encoder_tokens
    weights = len(config.cross_attention_layers) * _kv_weights(config.decoder, config.encoder.d_model)
    moved = weights + tokens * config.encoder.d_model
    return Cost(2 * tokens * weights, moved * bytes_per_element + work.batch * cross_kv_bytes(config, work, bytes_per_element))


def cross_kv_bytes(config: ReaderConfig, work: Workload, bytes_per_element: int) -> int:
    """Bytes that one question's cross-attention keys and values take."""
    stack = config.decoder
    return 2 * len(config.cross_attention_layers) * stack.num_kv_heads * stack.d_kv * work.encoder_tokens * bytes_per_element


def self_kv_bytes(config: ReaderConfig, tokens: float, bytes_per_element: int) -> float:
    """Bytes that the self-attention keys and values of one answer of `tokens` take."""
    stack = config.decoder
    return 2 * stack.num_layers * stack.num_kv_heads * stack.d_kv * tokens * bytes_per_element


def step_weights(config: ReaderConfig) -> int:
    """Weights that every decoder step reads: all of the decoder but the maps to cross-attention keys and values, and the head."""
    stack = config.decoder
    cross = len(config.cross_attention_layers) * 2 * stack.d_model * stack.num_heads * stack.d_kv
    layers = (_attention_weights(stack, stack.d_model) + _feed_forward_weights(stack, config)) * stack.num_layers
    return layers + cross + config.vocab_size * stack.d_model


def step_parts(config: ReaderConfig, work: Workload, bytes_per_element: int) -> dict[str, Cost]:
    """One token for every question of the batch, halfway through the answer: weights, cross-attention and self-attention apart."""
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
    """One decoder step, all parts together."""
    parts = step_parts(config, work, bytes_per_element)
    return parts["weights"] + parts["cross_attention"] + parts["self_attention"]


def decoder_cost(config: ReaderConfig, work: Workload, bytes_per_element: int) -> Cost:
    """Whole answers of the batch: keys and values once, then every step."""
    return cross_kv_cost(config, work, bytes_per_element) + step_cost(config, work, bytes_per_element) * work.new_tokens


def encoder_multiplications_paper(config: ReaderConfig, work: Workload) -> float:
    """12 n d^2 L: the paper's count for one question, of an encoder with d_ff = 4 d, ungated, and passages short beside d."""
    return 12 * work.encoder_tokens * config.encoder.d_model**2 * config.encoder.num_layers


def cross_kv_multiplications_paper(config: ReaderConfig, work: Workload) -> float:
    """2 n d^2 L / K: the paper's count for one question, of a multi-head decoder as wide as the encoder."""
    layers = config.decoder.num_layers / config.encoder_decoder_attention_period
    return 2 * work.encoder_tokens * config.encoder.d_model**2 * layers


def largest_batch(config: ReaderConfig, work: Workload, bytes_per_element: int, memory_bytes: int, parameters: int) -> int:
    """Questions whose keys and values fit beside the weights; activations are not counted."""
    a_question = cross_kv_bytes(config, work, bytes_per_element) + self_kv_bytes(config, work.new_tokens, bytes_per_element)
    return int((memory_bytes - parameters * bytes_per_element) // a_question)
