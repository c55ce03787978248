"""Engine directories: written whole or not at all, with the one manifest that describes them.

Comes in: a checkpoint and the files exported from it. Goes out: a directory that holds those files and manifest.json. Every manifest of
the project is built here. Needs neither torch nor onnx by itself, so that TensorRT engines can be compiled without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checkpoint.config import PROMPT_TEMPLATE as PROMPT_TEMPLATE
from export.checkpoint.config import ReaderConfig
from serving.contract.gemms import StackSizes
from serving.contract.library_kernels import EncoderLibrary
from serving.contract.manifest import MANIFEST_FILE, EngineBuild, Manifest, Prompt, sha256_of_file
from serving.contract.tensors import EngineSizes

if TYPE_CHECKING:
    from export.checkpoint.files import Checkpoint
    from export.model.reader import Reader


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """A temporary directory that replaces `directory` when the block ends.

    After an error or a signal `directory` is as before. Its mode follows the umask, so that another user may read it. A crash between the
    two renames leaves the former content as `.NAME.old`; the next call puts it back first.

    Args:
        directory: created if missing, with its parents.

    Yields:
        An empty directory next to `directory`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    old = directory.with_name(f".{directory.name}.old")
    if old.exists() and not directory.exists():
        old.rename(directory)
    tmp_dir = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    tmp_dir.mkdir()
    try:
        yield tmp_dir
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        try:
            tmp_dir.rename(directory)
        except BaseException:
            if old.exists():
                old.rename(directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the former content or the new one. Its mode follows the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_file = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        tmp_file.write_bytes(content)
        os.replace(tmp_file, path)
    finally:
        tmp_file.unlink(missing_ok=True)


def engine_sizes(config: ReaderConfig) -> EngineSizes:
    """The part of a reader's configuration that the shapes of its engines depend on."""
    return EngineSizes(
        d_model_encoder=config.encoder.d_model,
        d_model_decoder=config.decoder.d_model,
        num_decoder_layers=config.decoder.num_layers,
        cross_attention_layers=config.cross_attention_layers,
        num_heads=config.decoder.num_heads,
        num_kv_heads=config.decoder.num_kv_heads,
        d_kv=config.decoder.d_kv,
        vocab_size=config.vocab_size,
        reads_encoder_positions=config.cross_attention_relative_bias,
    )


def prompt_of(config: ReaderConfig, tokenizer_json: str) -> Prompt:
    """How the reader's inputs are written. They end with the tokenizer's end token, which need not be the one that ends answers."""
    from export.checkpoint.tokenizer import end_token_id  # imports the tokenizers library, which compiling engines does not need

    end = end_token_id(tokenizer_json)
    return Prompt(
        config.prompt_template,
        config.passage_length,
        config.append_eos,
        config.prompt_template_without_title,
        None if end == config.eos_token_id else end,
    )


def describe_reader(
    checkpoint: Checkpoint,
    directory: Path,
    opset: int,
    seconds: Mapping[str, float],
    *,
    engine: str = "onnxruntime",
    precision: str = "float32",
    encoder: StackSizes | None = None,
    decoder: StackSizes | None = None,
    encoder_library: EncoderLibrary | None = None,
    cross_kv_precision: str = "float16",
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of exported graphs. Every file in `directory` belongs to it.

    Args:
        checkpoint: what was exported.
        directory: holds the files, and no manifest yet.
        opset: of the ONNX graphs.
        seconds: graph name -> export time.
        engine: what runs the graphs, "onnxruntime" or "onnxruntime-gpu".
        precision: of weights and activations.
        encoder: sizes of the encoder where it is split into GEMMs.
        decoder: sizes of the decoder where it is split into GEMMs.
        encoder_library: the encoder's GEMMs where they are library kernels.
        cross_kv_precision: of cross-attention's cache on a GPU.
        notes: more provenance.
    """
    config = checkpoint.reader.config
    return Manifest(
        reader=config.kind,
        engine=engine,
        precision=precision,
        sizes=engine_sizes(config),
        prompt=prompt_of(config, checkpoint.tokenizer_json),
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        files=hashes(directory),
        weights_sha256=sha256_of_weights(checkpoint.reader),
        provenance={
            "source": Path(checkpoint.source).name,
            "layout": checkpoint.layout,
            "parameters": sum(weight.numel() for weight in checkpoint.reader.parameters()),
            "opset": opset,
            "export_s": dict(seconds),
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "onnx")},
            **({"uptrained": checkpoint.uptrained} if checkpoint.uptrained else {}),
            **(notes or {}),
        },
        encoder=encoder,
        decoder=decoder,
        encoder_library=encoder_library,
        cross_kv_precision=cross_kv_precision,
    )


def describe_compiled(graphs: Manifest, directory: Path, build: EngineBuild) -> Manifest:
    """The manifest of TensorRT engines in `directory`, compiled from the graphs that `graphs` describes."""
    return dataclasses.replace(graphs, engine="tensorrt", files=hashes(directory), build=build)


def write_manifest(manifest: Manifest, directory: Path) -> Manifest:
    """Write manifest.json, the last file of an engine directory; returns `manifest`."""
    (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def hashes(directory: Path) -> dict[str, str]:
    """Name -> hex SHA-256 of every file in a directory."""
    return {file.name: sha256_of_file(file) for file in sorted(directory.iterdir())}


def sha256_of_weights(reader: Reader) -> str:
    """Hex SHA-256 over all weights in order of their names, as float32. Equal readers have equal hashes, whatever file they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(reader.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
