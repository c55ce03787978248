"""The configuration of a reader: one class for FiD and FiDO, and the published sizes.

Comes in: fields of a config.json, or the name of a published size. Goes out: `ReaderConfig`, from which export/ builds everything else.
A FiD reader has `encoder_decoder_attention_period=1` and as many key/value heads as query heads. A FiDO reader has a longer period, fewer
key/value heads, and a decoder with sizes of its own. Reads no files and needs no package.
"""

from __future__ import annotations

import dataclasses
import json
import math
import string
from collections.abc import Mapping
from typing import Any, Literal

from export.errors import ConfigError

FeedForward = Literal["relu", "gated-gelu"]
PROMPT_TEMPLATE = "question: {question} title: {title} context: {context}"  # facebookresearch/FiD's
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, type(None)),
}


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Sizes of one T5 stack (encoder or decoder).

    Attributes:
        d_model: width of the residual stream.
        d_kv: width of one attention head; heads * d_kv need not equal d_model.
        d_ff: inner width of the feed-forward layer (of each of its two branches when gated).
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key and value heads: num_heads for multi-head, 1 for multi-query, a divisor in between for grouped-query attention.
    """

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    def faults(self, name: str) -> list[str]:
        """Faults of these sizes, one line each, prefixed by `name`."""
        found = [
            f"{name}.{field.name}: wanted a positive integer, got {getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if type(getattr(self, field.name)) is not int or getattr(self, field.name) < 1
        ]
        if not found and self.num_heads % self.num_kv_heads:
            found.append(f"{name}.num_kv_heads: wanted a divisor of num_heads={self.num_heads}, got {self.num_kv_heads}")
        return found


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """Architecture and prompt length of a FiD or FiDO checkpoint.

    Attributes:
        encoder: sizes of the encoder; always multi-head.
        decoder: sizes of the decoder, for self- and cross-attention alike.
        vocab_size: rows of the embedding.
        encoder_decoder_attention_period: layer-sparse cross-attention (LSA): decoder layer i has cross-attention where
            (i + 1) % period == 0. With 24 layers and period 6: layers 5, 11, 17 and 23. The other layers own no cross-attention weights.
        feed_forward_proj: "relu" (T5 v1.0) or "gated-gelu" (T5 v1.1, Flan; gelu in its tanh form).
        tie_word_embeddings: the output head is the decoder's embedding.
        scale_decoder_outputs: multiply the last hidden state by d_model**-0.5 before the head (T5 v1.0, where the head is tied).
        cross_attention_relative_bias: add a relative position bias in cross-attention. T5 has none, but transformers before 4.0 added one,
            and FiD's released readers were trained with it.
        append_eos: whether `</s>` ends every encoder input. The readers of facebookresearch/FiD were trained without it.
        passage_length: tokens kept of each prompt (question, title and passage together), `</s>` included.
        prompt_template: text of an encoder input, with the fields {question}, {title} and {context}.
        prompt_template_without_title: text where a passage has no title; None uses `prompt_template` with an empty title.
    """

    encoder: StackConfig
    decoder: StackConfig
    vocab_size: int
    encoder_decoder_attention_period: int = 1
    feed_forward_proj: FeedForward = "gated-gelu"
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool = False
    cross_attention_relative_bias: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    append_eos: bool = True
    passage_length: int = 256
    prompt_template: str = PROMPT_TEMPLATE
    prompt_template_without_title: str | None = None

    def __post_init__(self) -> None:
        faults = self.encoder.faults("encoder") + self.decoder.faults("decoder")
        for field in dataclasses.fields(self):
            value, types = getattr(self, field.name), FIELD_TYPES.get(str(field.type))
            if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
                faults.append(f"{field.name}: wanted {field.type}, got {value!r}")
        if faults:  # the checks below compare numbers
            raise ConfigError(f"reader configuration: {'; '.join(faults)}")
        if self.encoder.num_kv_heads != self.encoder.num_heads:
            faults.append(
                f"encoder.num_kv_heads: wanted num_heads={self.encoder.num_heads} (FiDO keeps the encoder multi-head), "
                f"got {self.encoder.num_kv_heads}"
            )
        period = self.encoder_decoder_attention_period
        if not 1 <= period <= self.decoder.num_layers:
            faults.append(f"encoder_decoder_attention_period: wanted 1 to decoder.num_layers={self.decoder.num_layers}, got {period}")
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            faults.append(f"feed_forward_proj: wanted 'relu' or 'gated-gelu', got {self.feed_forward_proj!r}")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4:
            faults.append(f"relative_attention_num_buckets: wanted a multiple of 4, got {buckets}")
        elif distance <= buckets // 2:  # the decoder's buckets up to there are exact, and the logarithmic ones would have no room
            faults.append(
                f"relative_attention_max_distance: wanted more than half of relative_attention_num_buckets={buckets}, got {distance}"
            )
        if not (math.isfinite(self.layer_norm_epsilon) and self.layer_norm_epsilon > 0):
            faults.append(f"layer_norm_epsilon: wanted a positive number, got {self.layer_norm_epsilon}")
        for token in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if not 0 <= getattr(self, token) < self.vocab_size:
                faults.append(f"{token}: wanted 0 to vocab_size-1={self.vocab_size - 1}, got {getattr(self, token)}")
        if self.passage_length < 2:
            faults.append(f"passage_length: wanted at least 2 tokens, got {self.passage_length}")
        faults += template_faults("prompt_template", self.prompt_template)
        if self.prompt_template_without_title is not None:
            faults += template_faults("prompt_template_without_title", self.prompt_template_without_title)
            if "{title}" in self.prompt_template_without_title:
                faults.append("prompt_template_without_title: wanted no {title}")
        if faults:
            raise ConfigError(f"reader configuration: {'; '.join(faults)}")

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Decoder layers with cross-attention, 0-based over the whole decoder."""
        period = self.encoder_decoder_attention_period
        return tuple(i for i in range(self.decoder.num_layers) if (i + 1) % period == 0)

    @property
    def kind(self) -> Literal["fid", "fido"]:
        """`fid` if every layer cross-attends with all heads, else `fido`."""
        dense = self.encoder_decoder_attention_period == 1 and self.decoder.num_kv_heads == self.decoder.num_heads
        return "fid" if dense else "fido"

    @property
    def shares_embedding(self) -> bool:
        """Whether encoder and decoder share one embedding, which they do if their widths are equal."""
        return self.encoder.d_model == self.decoder.d_model

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ReaderConfig:
        """The inverse of `to_json`. Raises ConfigError that names every unknown and every missing field."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
        sizes = {f.name for f in dataclasses.fields(StackConfig)}
        faults = [f"unknown field {n!r}" for n in fields if n not in known] + [f"missing field {n!r}" for n in required - set(fields)]
        for stack in ("encoder", "decoder"):
            found = fields.get(stack)
            if not isinstance(found, Mapping):
                faults += [f"{stack}: wanted an object, got {found!r}"] if stack in fields else []
            elif set(found) != sizes:
                faults.append(f"{stack}: wanted exactly the fields {sorted(sizes)}, got {sorted(found)}")
        if faults:
            raise ConfigError(f"reader configuration: {'; '.join(faults)}")
        stacks = {stack: StackConfig(**fields[stack]) for stack in ("encoder", "decoder")}
        return cls(**{**fields, **stacks})


def template_faults(name: str, template: str) -> list[str]:
    """What keeps `template` from being a prompt, one line each, prefixed by `name`.

    The question comes before the title and the passage, because a long prompt is cut at its end and never in its question.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return [f"{name}: wanted text with {{question}}, {{title}} and {{context}}, got {template!r} ({error})"]
    found = [field for _, field, _, _ in parts if field is not None]
    plain = all(not spec and not conversion for _, field, spec, conversion in parts if field is not None)
    if not plain or found not in (["question", "title", "context"], ["question", "context"]):
        return [f"{name}: wanted {{question}}, then {{title}} or not, then {{context}}, each once, got {template!r}"]
    return []


def own_config(fields: Mapping[str, Any]) -> ReaderConfig:
    """The configuration in a config.json of our own layout; its other fields are ignored."""
    return ReaderConfig.from_dict({k: v for k, v in fields.items() if k not in ("model_type", "notes")})


# T5 v1.1's published sizes: (d_model, d_ff, num_layers, num_heads). Every head has width 64.
_SIZES = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
FIDO_PERIOD = 6  # the FiDO paper's sparsity
VOCAB_SIZE = 32128  # T5's 32,000 pieces and 100 sentinels, padded to a multiple of 128


def stack_preset(size: str, num_kv_heads: int | None = None) -> StackConfig:
    """T5 v1.1 sizes by name (small, base, large, xl, xxl), multi-head by default. Raises ConfigError for another name."""
    if size not in _SIZES:
        raise ConfigError(f"preset size: wanted one of {', '.join(_SIZES)}, got {size!r}")
    d_model, d_ff, num_layers, num_heads = _SIZES[size]
    return StackConfig(d_model, 64, d_ff, num_layers, num_heads, num_kv_heads or num_heads)


def reader_preset(name: str, *, fido: bool, period: int | None = None, num_kv_heads: int | None = None) -> ReaderConfig:
    """A reader of published size with T5 v1.1's architecture.

    Args:
        name: `base`, or `base-xl` for a base encoder with an XL decoder. The FiDO paper has base-XL and large-XXL.
        fido: cross-attention in every `FIDO_PERIOD`-th layer (in the last one of a shorter decoder), and one key/value head.
        period: overrides the period, for ablations.
        num_kv_heads: overrides the key/value heads of the decoder, for ablations.

    Raises:
        ConfigError: if the name is unknown or the sizes do not fit together.
    """
    encoder, _, decoder = name.lower().partition("-")
    decoder_stack = stack_preset(decoder or encoder, num_kv_heads or (1 if fido else None))
    return ReaderConfig(
        encoder=stack_preset(encoder),
        decoder=decoder_stack,
        vocab_size=VOCAB_SIZE,
        encoder_decoder_attention_period=period or (min(FIDO_PERIOD, decoder_stack.num_layers) if fido else 1),
    )
