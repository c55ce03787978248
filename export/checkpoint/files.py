"""Checkpoint files: reads any of three layouts into a `Reader`, and writes our own.

Comes in: a Hugging Face T5 or Flan-T5 directory or hub name, a facebookresearch/FiD directory, or a directory of our own layout
(config.json, model.safetensors, tokenizer.json). Goes out: a `Checkpoint`, or one `CheckpointError` of one line. What a layout does not
state and is assumed is printed as a warning. source_files.py reads the files, t5_config.py and weights.py interpret them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.errors import CheckpointError, ConfigError
from export.model.reader import Reader

from .config import ReaderConfig, own_config
from .source_files import listed, one_line, read_json, read_weights
from .t5_config import reader_config
from .tokenizer import TOKENIZER_FILE, require_embeddings
from .tokenizer import read_tokenizer as read_tokenizer
from .weights import (
    HF_CROSS_BIAS,
    is_wrapped,
    require_t5,
    state_dict_from_weights,
    unwrapped_name,
    with_shared_embedding,
    without_common_prefix,
)

MODEL_TYPE = "fid-reader"  # in config.json; marks our own layout
WEIGHTS_FILE = "model.safetensors"
FID_PASSAGE_LENGTH = 200  # facebookresearch/FiD's text_maxlength; its large readers were trained with 250
# Fields of ReaderConfig that no T5 checkpoint states, and the options that state them.
ASSUMED = {"prompt_template": "--prompt-template", "append_eos": "--append-eos or --no-append-eos", "passage_length": "--passage-length"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read into memory.

    Attributes:
        reader: fp32, in eval mode.
        tokenizer_json: the tokenizer in the `tokenizers` library's JSON.
        source: directory or hub name, as the caller wrote it.
        layout: "own", "hugging-face" or "facebookresearch/FiD".
        directory: of the files; None if the reader was not read from files.
        uptrained: what `python -m training uptrain` noted of the training; None for other checkpoints.
    """

    reader: Reader
    tokenizer_json: str
    source: str
    layout: str
    directory: Path | None = None
    uptrained: dict[str, Any] | None = None


def load_checkpoint(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    passage_length: int | None = None,
    append_eos: bool | None = None,
    cross_attention_bias: bool | None = None,
    prompt_template: str | None = None,
    prompt_template_without_title: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known layout.

    Args:
        source: a directory, or a hub name such as google/flan-t5-base.
        tokenizer: directory or file of the tokenizer; needed where the checkpoint has none (facebookresearch/FiD).
        passage_length: tokens kept of each prompt. The default is the checkpoint's own where it states one, 200 for FiD's readers, and 256
            for T5.
        append_eos: end each encoder input with `</s>`. The default is no for FiD's readers and yes for Hugging Face's.
        cross_attention_bias: apply the relative bias in cross-attention where the checkpoint holds one. The default is yes for FiD's
            readers, which were trained with it, and no for Hugging Face's, where it is unused and transformers drops it too.
        prompt_template: text of an encoder input, with {question}, {title} and {context}. The default is the checkpoint's own where it
            states one, else that of facebookresearch/FiD.
        prompt_template_without_title: text where a passage has no title; by default `prompt_template` with an empty title.

    Raises:
        CheckpointError: if anything is missing, extra, misshapen, not finite or unreadable.
        ConfigError: if config.json or the options contradict themselves.
    """
    directory = _directory_of(source)
    overrides = {
        "passage_length": passage_length,
        "append_eos": append_eos,
        "prompt_template": prompt_template,
        "prompt_template_without_title": prompt_template_without_title,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    warnings: list[str] = []  # printed once nothing can fail any more, so that an error is one line
    fields, config = _read_config(directory, warnings)
    tokenizer_json = read_tokenizer(Path(tokenizer) if tokenizer else directory, config.vocab_size)
    require_embeddings(tokenizer_json, config.vocab_size, str(source))
    reader, layout = _read_reader(directory, str(source), fields, config, cross_attention_bias, overrides, warnings)
    reader.requires_grad_(False)
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    notes = fields.get("notes") if layout == "own" else None
    uptrained = notes.get("uptrain") if isinstance(notes, dict) else None
    return Checkpoint(reader, tokenizer_json, str(source), layout, directory, uptrained)


def load_reader(source: str | Path) -> Reader:
    """The reader of a checkpoint directory without its tokenizer, trainable; otherwise as `load_checkpoint`."""
    directory = Path(source)
    return _read_reader(directory, str(source), *_read_config(directory, []), None, {}, [])[0]


def _read_config(directory: Path, warnings: list[str]) -> tuple[dict[str, Any], ReaderConfig]:
    """The fields of config.json, and the configuration as far as it is certain without the weights."""
    path = directory / "config.json"
    if not path.exists() and (directory / "adapter_config.json").exists():
        read_weights(directory)  # says what an adapter needs
    fields = read_json(path, "a checkpoint directory holds config.json and the weights")
    kind = fields.get("model_type", "t5")
    if kind == MODEL_TYPE:
        try:
            return fields, own_config(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if kind != "t5":
        raise CheckpointError(f"{path}: model_type: wanted t5 or {MODEL_TYPE}, got {kind!r}")
    generation = directory / "generation_config.json"
    return fields, reader_config(
        fields, read_json(generation) if generation.exists() or generation.is_symlink() else None, directory, warnings.append
    )


def _read_reader(
    directory: Path,
    source: str,
    fields: dict[str, Any],
    config: ReaderConfig,
    cross_attention_bias: bool | None,
    overrides: dict[str, Any],
    warnings: list[str],
) -> tuple[Reader, str]:
    """The reader in eval mode, and the checkpoint's layout."""
    own = fields.get("model_type") == MODEL_TYPE
    layout = "own"
    if own:
        config = dataclasses.replace(config, **overrides)
    weights = read_weights(directory)
    if not own:
        weights = without_common_prefix(weights)
        wrapped = is_wrapped(weights)
        layout = "facebookresearch/FiD" if wrapped else "hugging-face"
        weights = with_shared_embedding({unwrapped_name(name): tensor for name, tensor in weights.items()})
        require_t5(weights, source)
        apply_bias = wrapped if cross_attention_bias is None else cross_attention_bias
        if HF_CROSS_BIAS in weights and not apply_bias:
            warnings.append(f"{directory}: the cross-attention bias is not applied; --cross-attention-bias applies it")
            del weights[HF_CROSS_BIAS]
        head = weights.get("lm_head.weight")
        if head is None and fields.get("tie_word_embeddings") is False:
            warnings.append(
                f"{directory}: lm_head.weight is missing, though tie_word_embeddings is false; the embedding is used, as in transformers"
            )
        tied = head is None or (head.shape == weights["shared.weight"].shape and torch.equal(head, weights["shared.weight"]))
        stated = {
            "tie_word_embeddings": tied,
            "cross_attention_relative_bias": HF_CROSS_BIAS in weights,
            "append_eos": not wrapped,
            "passage_length": FID_PASSAGE_LENGTH if wrapped else config.passage_length,
        }
        config = dataclasses.replace(config, **{**stated, **overrides})
        warnings += _assumptions(directory, config, overrides)
    state = state_dict_from_weights(config, weights, source=source, hugging_face=not own)
    with torch.device("meta"):  # draws no random weights only to replace them
        reader = Reader(config)
    reader.load_state_dict(state, assign=True)
    return reader.eval(), layout


def _assumptions(directory: Path, config: ReaderConfig, stated: dict[str, Any]) -> list[str]:
    """What neither the files nor an option states, in one line: with another prompt than in training, a reader answers worse."""
    values = {
        "prompt_template": f"the prompt {config.prompt_template!r}",
        "append_eos": f"{'' if config.append_eos else 'no '}</s> at its end",
        "passage_length": f"{config.passage_length} tokens of it",
    }
    assumed = [name for name in ASSUMED if name not in stated]
    if not assumed:
        return []
    options = ", ".join(ASSUMED[name] for name in assumed)
    return [f"{directory}: assumed {', '.join(values[name] for name in assumed)}, which its files do not state; {options} would"]


def save_reader(
    directory: str | Path,
    reader: Reader,
    tokenizer_file: str | Path,
    dtype: torch.dtype = torch.float16,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a reader in our own layout. Files of an existing checkpoint are replaced one by one, each atomically.

    Args:
        directory: created if missing.
        reader: on any device, of any dtype.
        tokenizer_file: a tokenizer.json to copy.
        dtype: of the stored weights.
        notes: provenance, stored in config.json under "notes".

    Raises:
        CheckpointError: if a weight is not finite, or exceeds the range of `dtype`. Nothing is written then.
    """
    state = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in reader.state_dict().items()}
    bad = sorted(name for name, weight in state.items() if not torch.isfinite(weight).all())
    if bad:
        raise CheckpointError(f"{directory}: not saved, because these weights are not finite in {dtype}: {listed(bad)}")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    fields = {"model_type": MODEL_TYPE, **json.loads(reader.config.to_json()), "notes": notes or {}}
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        save_file(state, str(Path(scratch, WEIGHTS_FILE)))
        Path(scratch, "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer_file, Path(scratch, TOKENIZER_FILE))
        for name in (WEIGHTS_FILE, "config.json", TOKENIZER_FILE):
            os.replace(Path(scratch, name), target / name)


def _directory_of(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise CheckpointError(f"{source}: wanted a directory with config.json and weights, or a hub name such as google/flan-t5-base")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"]
        wanted += ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
        found = Path(snapshot_download(str(source), allow_patterns=wanted))
        if not list(found.glob("model*.safetensors")):
            wanted += ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
            found = Path(snapshot_download(str(source), allow_patterns=wanted))
        return found
    except Exception as error:  # the hub's client raises errors of several libraries
        raise CheckpointError(f"{source}: no such directory, and the hub does not have it: {one_line(error)}") from error
