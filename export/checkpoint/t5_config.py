"""The configuration of transformers' T5 as a `ReaderConfig`.

Comes in: the fields of config.json and generation_config.json. Goes out: a ReaderConfig, or one `CheckpointError` that names the field.
transformers' own T5Config interprets the fields, so aliases, defaults and overrides mean what they mean there. What changes the numbers and
has no place in our graphs is refused. Reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.errors import CheckpointError, ConfigError

from .config import FeedForward, ReaderConfig, StackConfig
from .source_files import one_line

# (dense_act_fn, is_gated_act) of T5Config -> our name. The second and third compute the same function.
FEED_FORWARDS: dict[tuple[Any, Any], FeedForward] = {
    ("relu", False): "relu",
    ("gelu_new", True): "gated-gelu",
    ("gelu_pytorch_tanh", True): "gated-gelu",
}
# Fields that change the numbers or the file, with the values that leave them as they are.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None, {}), "quantised weights are not read: export the model before it was quantised"),
    "compression_config": ((None, {}), "compressed weights are not read: export the model before it was compressed"),
    "is_encoder_decoder": ((None, True), "an encoder-only T5 cannot answer"),
    "tie_encoder_decoder": ((None, False), "save the two stacks with weights of their own"),
    "pruned_heads": ((None, {}, []), "pruned heads are not supported"),
    "transformers_weights": ((None,), "rename that file to model.safetensors and remove the field"),
    "adapters": ((None, {}), "adapters are not supported: merge them and save the model"),
}
# Decoding settings that transformers' generate() applies, with the values that change no answer. Readers decode greedily.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "do_sample": (None, False),
    "penalty_alpha": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "sequence_bias": (None, [], {}),
    "stop_strings": (None, []),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None, {}),
}


def reader_config(
    fields: Mapping[str, Any], generation: Mapping[str, Any] | None, directory: Path, warn: Callable[[str], object]
) -> ReaderConfig:
    """The configuration that transformers would build from these files.

    Args:
        fields: of config.json.
        generation: of generation_config.json; None if there is none.
        directory: of the files, for errors.
        warn: called with each line about a setting that is obeyed against config.json, or not applied.

    Raises:
        CheckpointError: if transformers refuses the fields, or one of them asks for something that our graphs do not compute.
    """
    path = directory / "config.json"
    for name, (allowed, advice) in REFUSED.items():
        if fields.get(name) not in allowed:
            raise CheckpointError(f"{path}: {name}: wanted {allowed[-1]!r} or none, got {one_line(fields[name])}; {advice}")
    from transformers import T5Config, logging  # takes seconds to import

    logging.set_verbosity_error()
    try:
        t5 = T5Config.from_dict(dict(fields))
    except Exception as error:  # huggingface_hub's strict dataclasses raise classes of their own
        raise CheckpointError(f"{path}: transformers' T5Config refuses it: {one_line(error)}") from error
    feed_forward = FEED_FORWARDS.get((t5.dense_act_fn, t5.is_gated_act))
    if feed_forward is None:
        raise CheckpointError(
            f"{path}: dense_act_fn, is_gated_act: wanted relu, false (feed_forward_proj relu) or gelu_new, true (gated-gelu), "
            f"got {t5.dense_act_fn}, {str(t5.is_gated_act).lower()} (feed_forward_proj {t5.feed_forward_proj})"
        )
    if not isinstance(t5.scale_decoder_outputs, bool):
        raise CheckpointError(f"{path}: scale_decoder_outputs: wanted true or false, got {t5.scale_decoder_outputs!r}")
    epsilon = t5.layer_norm_epsilon
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise CheckpointError(f"{path}: layer_norm_epsilon: wanted a positive number, got {epsilon}")
    tokens = _tokens(t5, generation, directory, warn)
    settings, settings_path = (fields, path) if generation is None else (generation, directory / "generation_config.json")
    ignored = [f"{name}={one_line(settings[name])}" for name, neutral in NEUTRAL.items() if settings.get(name) not in neutral]
    if ignored:
        warn(f"{settings_path}: {', '.join(ignored)}: not applied, because readers decode greedily")

    def stack(layers: int) -> StackConfig:
        return StackConfig(t5.d_model, t5.d_kv, t5.d_ff, layers, t5.num_heads, t5.num_heads)

    try:
        return ReaderConfig(
            encoder=stack(t5.num_layers),
            decoder=stack(t5.num_decoder_layers),
            vocab_size=t5.vocab_size,
            feed_forward_proj=feed_forward,
            tie_word_embeddings=True,  # only the weights show whether the head is tied
            scale_decoder_outputs=t5.scale_decoder_outputs,
            relative_attention_num_buckets=t5.relative_attention_num_buckets,
            relative_attention_max_distance=t5.relative_attention_max_distance,
            layer_norm_epsilon=float(epsilon),
            eos_token_id=tokens["eos_token_id"],
            pad_token_id=tokens["pad_token_id"],
            decoder_start_token_id=tokens["decoder_start_token_id"],
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _tokens(t5: Any, generation: Mapping[str, Any] | None, directory: Path, warn: Callable[[str], object]) -> dict[str, int]:
    """The token ids that generate() would use: generation_config.json comes before config.json."""
    ids: dict[str, list[int]] = {}
    for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id", "bos_token_id"):
        ids[name] = _ids(getattr(t5, name, None), name, directory / "config.json")
        stated = _ids((generation or {}).get(name), name, directory / "generation_config.json")
        if stated and stated != ids[name]:
            got = ids[name] or "none"
            if name != "bos_token_id":
                warn(f"{directory}: {name}: generation_config.json's {stated} is used, config.json has {got}")
            ids[name] = stated
    end = sorted({token for token in ids["eos_token_id"] if 0 <= token < t5.vocab_size} or set(ids["eos_token_id"]))
    if len(end) != 1:
        raise CheckpointError(
            f"{directory}: eos_token_id: wanted one token, at which a reader stops, got {end or 'none'}; state one in config.json "
            "(and in generation_config.json, if there is one)"
        )
    pad = ids["pad_token_id"] or end  # as generate() does; padding is masked
    start = ids["decoder_start_token_id"] or ids["bos_token_id"] or ids["pad_token_id"]
    if not start:
        raise CheckpointError(f"{directory / 'config.json'}: decoder_start_token_id: wanted a token, got none; T5's is its pad token, 0")
    for name, found in (("pad_token_id", pad), ("decoder_start_token_id", start)):
        if len(found) != 1:
            raise CheckpointError(f"{directory}: {name}: wanted one token, got {found}")
    return {"eos_token_id": end[0], "pad_token_id": pad[0], "decoder_start_token_id": start[0]}


def _ids(value: Any, name: str, path: Path) -> list[int]:
    """A token field as a list: transformers writes one id, a list of ids, or null."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) for token in found):
        raise CheckpointError(f"{path}: {name}: wanted a token id, a list of them or null, got {one_line(value)}")
    return found
