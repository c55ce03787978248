"""Checkpoint files: reads any of three layouts into a `Reader`, and writes our own.

Comes in: a Hugging Face T5 or Flan-T5 directory or hub name, a facebookresearch/FiD directory, or a directory of our own layout
(config.json, model.safetensors, tokenizer.json). Goes out: a `Checkpoint`. Weights are read as tensors only, by `safetensors` or
`torch.load(weights_only=True)`: no code in a pickle is run.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.errors import CheckpointError
from export.model.reader import Reader

from .config import ReaderConfig, StackConfig, own_config
from .weights import HF_CROSS_BIAS, is_wrapped, state_dict_from_weights, unwrapped_name

MODEL_TYPE = "fid-reader"  # in config.json; marks our own layout
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FID_PASSAGE_LENGTH = 200  # facebookresearch/FiD's text_maxlength; its large readers were trained with 250


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read into memory.

    Attributes:
        reader: fp32, in eval mode.
        tokenizer_json: the tokenizer in the `tokenizers` library's JSON.
        source: directory or hub name, as the caller wrote it.
        layout: "own", "hugging-face" or "facebookresearch/FiD".
    """

    reader: Reader
    tokenizer_json: str
    source: str
    layout: str


def load_checkpoint(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    passage_length: int | None = None,
    append_eos: bool | None = None,
    cross_attention_bias: bool | None = None,
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

    Raises:
        CheckpointError: if anything is missing, extra, misshapen or unreadable.
        ConfigError: if config.json contradicts itself.
    """
    directory = _directory_of(source)
    reader, layout = _read_reader(
        directory, str(source), cross_attention_bias, {"passage_length": passage_length, "append_eos": append_eos}
    )
    reader.requires_grad_(False)
    return Checkpoint(reader, read_tokenizer(Path(tokenizer) if tokenizer else directory), str(source), layout)


def load_reader(source: str | Path) -> Reader:
    """The reader of a checkpoint directory without its tokenizer, trainable; otherwise as `load_checkpoint`."""
    return _read_reader(Path(source), str(source), None, {})[0]


def _read_reader(directory: Path, source: str, cross_attention_bias: bool | None, overrides: dict[str, Any]) -> tuple[Reader, str]:
    """The reader in eval mode, and the checkpoint's layout."""
    fields = _config_fields(directory)
    weights = _read_weights(directory)
    own = fields.get("model_type") == MODEL_TYPE
    if own:
        layout, config = "own", own_config(fields)
    else:
        wrapped = is_wrapped(weights)
        layout = "facebookresearch/FiD" if wrapped else "hugging-face"
        weights = {unwrapped_name(name): tensor for name, tensor in weights.items()}
        config = _hf_config(fields, weights, directory)
        apply_bias = wrapped if cross_attention_bias is None else cross_attention_bias
        if HF_CROSS_BIAS in weights and not apply_bias:
            print(f"{directory}: the cross-attention bias is not applied; --cross-attention-bias applies it", file=sys.stderr)
            del weights[HF_CROSS_BIAS]
        config = dataclasses.replace(
            config,
            cross_attention_relative_bias=HF_CROSS_BIAS in weights,
            append_eos=not wrapped,
            passage_length=FID_PASSAGE_LENGTH if wrapped else config.passage_length,
        )
    config = dataclasses.replace(config, **{name: value for name, value in overrides.items() if value is not None})
    state = state_dict_from_weights(config, weights, source=source, hugging_face=not own)
    with torch.device("meta"):  # draws no random weights only to replace them
        reader = Reader(config)
    reader.load_state_dict(state, assign=True)
    return reader.eval(), layout


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
        raise CheckpointError(f"{directory}: not saved, because these weights are not finite in {dtype}: {', '.join(bad)}")
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
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "spiece.model"]
        found = Path(snapshot_download(str(source), allow_patterns=wanted))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*wanted, "pytorch_model*.bin", "*.bin.index.json"]))
        return found
    except Exception as error:  # the hub's client raises errors of several libraries
        raise CheckpointError(f"{source}: no such directory, and the hub does not have it: {error}") from error


def _config_fields(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint directory holds config.json and the weights") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("model_type", "t5") not in ("t5", MODEL_TYPE):
        got = fields.get("model_type") if isinstance(fields, dict) else fields
        raise CheckpointError(f"{path}: model_type: wanted t5 or {MODEL_TYPE}, got {got!r}")
    return fields


def _hf_config(fields: dict[str, Any], weights: dict[str, Tensor], directory: Path) -> ReaderConfig:
    """ReaderConfig from the config.json of transformers' T5, from 3.x to 5.x."""
    missing = [name for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads") if name not in fields]
    if missing:
        raise CheckpointError(f"{directory / 'config.json'}: missing {', '.join(missing)}")
    heads = fields["num_heads"]

    def stack(layers: int) -> StackConfig:
        return StackConfig(fields["d_model"], fields["d_kv"], fields["d_ff"], layers, heads, heads)

    # transformers 5 writes tie_word_embeddings=true for every T5, and scale_decoder_outputs has the flag's former meaning. Only the weights
    # show then whether the head is tied.
    flag = fields.get("tie_word_embeddings", True)
    head, shared = weights.get("lm_head.weight"), weights.get("shared.weight")
    tied = flag if head is None or shared is None else head.shape == shared.shape and torch.equal(head, shared)
    return ReaderConfig(
        encoder=stack(fields["num_layers"]),
        decoder=stack(fields.get("num_decoder_layers") or fields["num_layers"]),
        vocab_size=fields["vocab_size"],
        feed_forward_proj=fields.get("feed_forward_proj", "relu"),
        tie_word_embeddings=tied,
        scale_decoder_outputs=fields.get("scale_decoder_outputs", flag),
        relative_attention_num_buckets=fields.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=fields.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=fields.get("layer_norm_epsilon", 1e-6),
        pad_token_id=fields.get("pad_token_id", 0),
        eos_token_id=fields.get("eos_token_id", 1),
        decoder_start_token_id=fields.get("decoder_start_token_id", fields.get("pad_token_id", 0)),
    )


def _read_weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{directory}: no weights; wanted *.safetensors or pytorch_model*.bin")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                weights.update(load_file(str(file)))
            else:
                weights.update(torch.load(file, map_location="cpu", weights_only=True))
        except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
        except Exception as error:  # pickle.UnpicklingError
            raise CheckpointError(f"{file}: wanted tensors only, got other objects: {error}") from error
    stray = sorted(name for name, value in weights.items() if not isinstance(value, Tensor))
    if stray:
        raise CheckpointError(f"{directory}: wanted tensors only, got other values under {', '.join(stray)}")
    return weights


def read_tokenizer(place: Path) -> str:
    """The tokenizer in a directory or file, as JSON of the `tokenizers` library; a lone spiece.model is converted."""
    path = place if place.is_file() else place / TOKENIZER_FILE
    if path.is_file() and path.suffix == ".json":
        return path.read_text(encoding="utf-8")
    pieces = place if place.is_file() else place / "spiece.model"
    if not pieces.is_file():
        raise CheckpointError(f"{place}: no tokenizer.json or spiece.model; pass one with --tokenizer (t5-base's for FiD's readers)")
    from transformers import T5TokenizerFast

    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(pieces, Path(scratch, "spiece.model"))
        return str(T5TokenizerFast.from_pretrained(scratch).backend_tokenizer.to_str())
