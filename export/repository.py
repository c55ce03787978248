"""Engines -> Triton model repository: config.pbtxt rendered from tensor specs and limits, and the engine files of each model.

Comes in: an engine directory and the limits. Goes out: the three models of a reader. The configurations are committed, so that the served
settings can be reviewed; engine files are not. Starts no server.

A model loads only with its manifest (a native TensorRT encoder: with its plan). The old manifests go first, then files and configurations
are replaced, then the new manifests are written. After a crash in between, the models do not load; they never load as a mix.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.build import require_reader_name
from export.manifest_writer import write_atomically
from serving.contract.call_sizes import encoder_batch
from serving.contract.limits import Limits
from serving.contract.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ManifestError
from serving.contract.tensors import READER_TENSORS, EngineSizes, GraphTensors, encoder_tensors

VERSION = "1"
CONFIG_FILE, MODEL_FILE = "config.pbtxt", "model.py"
NATIVE_ENGINE = "model.plan"  # the file name that Triton's TensorRT backend expects
HEADER = "# Rendered by `python -m export repository` from serving/contract/{tensors,limits}.py: change those, not this.\n"
ENTRY_POINTS = {
    "encoder": '"""Triton entry point of the encoder model."""\n\n'
    "from serving.triton.encoder_model import EncoderModel as TritonPythonModel  # noqa: F401\n",
    "reader": '"""Triton entry point of the reader: the chain behind one request."""\n\n'
    "from serving.triton.reader_model import ReaderModel as TritonPythonModel  # noqa: F401\n",
}
ENTRY_POINTS["stream"] = ENTRY_POINTS["reader"]


def model_names(reader: str) -> dict[str, str]:
    """Role (encoder, reader, stream) -> name of the Triton model that has it."""
    return {"encoder": f"{reader}_encoder", "reader": reader, "stream": f"{reader}_stream"}


def render_config(fields: dict[str, Any]) -> str:
    """The text of config.pbtxt. Triton's own protobuf refuses unknown fields and wrong types."""
    config = json_format.ParseDict(fields, ModelConfig())
    text = text_format.MessageToString(config)
    # proto3 omits a zero, but Triton completes a missing max_batch_size by itself
    return HEADER + (text if "max_batch_size" in text else text.replace("input {", "max_batch_size: 0\ninput {", 1))


def _io(tensors: GraphTensors, *, batched: bool) -> dict[str, Any]:
    return {
        "input": [spec.triton(batched=batched) for spec in tensors.inputs],
        "output": [spec.triton(batched=batched) for spec in tensors.outputs],
    }


def _common(name: str, parameters: dict[str, str], *, on_gpu: bool, instances: int = 1) -> dict[str, Any]:
    return {
        "name": name,
        "backend": "python",
        "instance_group": [{"kind": "KIND_GPU", "count": instances, "gpus": [0]} if on_gpu else {"kind": "KIND_CPU", "count": instances}],
        "parameters": {key: {"string_value": value} for key, value in sorted(parameters.items())},
    }


def encoder_config(reader: str, sizes: EngineSizes, limits: Limits, *, on_gpu: bool = False) -> dict[str, Any]:
    """`<reader>_encoder`: a passage is one element of Triton's batch, so the dynamic batcher can combine questions.

    On a CPU a call of one question keeps the cores busy, and the batcher's thread, which spins while requests wait, would take a fifth of
    one: measured on two cores, 42 questions/s with it and 50 without. It is there where `encoder_batch` asks for it.
    """
    names = ("intra_op_threads", *(("max_passages", "encoder_batch") if on_gpu else ()))
    config = {
        **_common(
            model_names(reader)["encoder"],
            limits.to_parameters(names),
            on_gpu=on_gpu,
            instances=limits.encoder_instances if on_gpu else 1,  # on a CPU one engine call uses all cores
        ),
        **_io(encoder_tensors(sizes, "float16" if on_gpu else "float32"), batched=True),
        # the largest question must fit in one batch
        "max_batch_size": encoder_batch(limits),
    }
    return config | ({"dynamic_batching": {}} if on_gpu or limits.encoder_batch else {})


def native_encoder_config(reader: str, sizes: EngineSizes, limits: Limits) -> dict[str, Any]:
    """`<reader>_encoder` for Triton's TensorRT backend, which NVIDIA's container has: no Python between batcher and engine."""
    config = encoder_config(reader, sizes, limits, on_gpu=True)
    del config["parameters"]
    return config | {
        "backend": "tensorrt",
        "default_model_filename": NATIVE_ENGINE,
        "instance_group": [{"kind": "KIND_GPU", "count": 1, "gpus": [0], "profile": ["0"]}],
        # a short wait for the passages of other questions: a full batch costs less per passage
        "dynamic_batching": {"max_queue_delay_microseconds": 1000},
    }


def reader_config(reader: str, limits: Limits, *, stream: bool, on_gpu: bool = False) -> dict[str, Any]:
    """`<reader>` (one response) or `<reader>_stream` (decoupled); the scheduler batches, not Triton."""
    fields = {
        **_common(
            model_names(reader)["stream" if stream else "reader"],
            {"reader": reader, **limits.to_parameters()},
            on_gpu=on_gpu,
            instances=limits.reader_instances,
        ),
        **_io(READER_TENSORS, batched=False),
        "max_batch_size": 0,
    }
    return fields | ({"model_transaction_policy": {"decoupled": True}} if stream else {})


def configs_of(
    reader: str, sizes: EngineSizes, limits: Limits, *, on_gpu: bool = False, native_encoder: bool = False
) -> dict[str, dict[str, Any]]:
    """Role -> configuration of the reader's three models."""
    return {
        "encoder": native_encoder_config(reader, sizes, limits) if native_encoder else encoder_config(reader, sizes, limits, on_gpu=on_gpu),
        "reader": reader_config(reader, limits, stream=False, on_gpu=on_gpu),
        "stream": reader_config(reader, limits, stream=True, on_gpu=on_gpu),
    }


def write_models(
    repository: Path, reader: str, sizes: EngineSizes, limits: Limits, *, on_gpu: bool = False, native_encoder: bool = False
) -> None:
    """Write config.pbtxt and 1/model.py of a reader's three models; unchanged files are left as they are."""
    configs = configs_of(reader, sizes, limits, on_gpu=on_gpu, native_encoder=native_encoder)
    for role, name in model_names(reader).items():
        if role != "encoder" or not native_encoder:
            _write(repository / name / VERSION / MODEL_FILE, ENTRY_POINTS[role])
        _write(repository / name / CONFIG_FILE, render_config(configs[role]))


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())


def repository_from_engines(engines: Path, repository: Path, reader: str, limits: Limits, *, native_encoder: bool = False) -> list[Path]:
    """Render a reader's models and put its engines into them.

    Args:
        engines: directory that `export_reader`, `export_gpu_reader` or `build_engines` wrote.
        repository: the model repository.
        reader: the name to serve under, any that `require_reader_name` allows.
        limits: written into the configurations.
        native_encoder: serve the encoder by Triton's own TensorRT backend, which NVIDIA's container has and the wheel has not.

    Returns:
        Every file of the three models.

    Raises:
        UsageError: if the name cannot be served.
        ManifestError: if the engine files do not match their manifest, or are not TensorRT's for a native encoder. In both cases nothing is
            written.
    """
    require_reader_name(reader)
    manifest = Manifest.load(engines)
    manifest.verify(engines, tuple(manifest.files))
    _require_fitting_encoder(engines, manifest, native_encoder=native_encoder)
    # version folder -> name there -> engine file; the stream model reads the unary model's folder
    folders = {role: repository / name / VERSION for role, name in model_names(reader).items()}
    placed: dict[str, dict[str, str]] = {"encoder": {}, "reader": {}, "stream": {}}
    for file in manifest.files:
        role = "encoder" if file.startswith("encoder") else "reader"
        placed[role][NATIVE_ENGINE if native_encoder and file == manifest.engine_file("encoder") else file] = file
    placed["encoder"].pop(TOKENIZER_FILE, None)
    last = {"encoder": NATIVE_ENGINE if native_encoder else MANIFEST_FILE, "reader": MANIFEST_FILE}
    placed["reader"][MANIFEST_FILE] = placed["encoder"][MANIFEST_FILE] = MANIFEST_FILE

    for folder in folders.values():  # from here to the end the models do not load
        for file in (MANIFEST_FILE, NATIVE_ENGINE):
            (folder / file).unlink(missing_ok=True)
    for role, files in placed.items():
        folders[role].mkdir(parents=True, exist_ok=True)
        kept = {*files} - {last.get(role)} | (set() if native_encoder and role == "encoder" else {MODEL_FILE})
        for path in folders[role].iterdir():
            if path.name not in kept and not path.is_dir():
                path.unlink()
        for target, file in files.items():
            if target != last[role]:
                _link_or_copy(engines / file, folders[role] / target)
    write_models(repository, reader, manifest.sizes, limits, on_gpu=manifest.on_gpu, native_encoder=native_encoder)
    for role, target in last.items():
        _link_or_copy(engines / placed[role][target], folders[role] / target)
    models = [repository / name for name in model_names(reader).values()]
    return [path for model in models for path in (model / CONFIG_FILE, *sorted((model / VERSION).iterdir())) if path.is_file()]


def _require_fitting_encoder(engines: Path, manifest: Manifest, *, native_encoder: bool) -> None:
    if native_encoder and manifest.engine != "tensorrt":
        raise ManifestError(
            f"{engines}: wanted TensorRT engines for Triton's tensorrt backend, got {manifest.engine}; `make export ENGINE=tensorrt`"
        )
    # of whole graphs, either backend can serve the encoder
    if native_encoder != (manifest.on_gpu and manifest.encoder is None) and not manifest.is_whole:
        wanted, flag = ("one graph", "with") if native_encoder else ("its GEMMs", "without")
        raise ManifestError(
            f"{engines}: wanted the encoder as {wanted}; export {flag} --whole-encoder (`make export TRITON_BACKEND=...` does)"
        )


def _link_or_copy(source: Path, target: Path) -> None:
    """Put `source` at `target` in one step: a hard link where the file system allows it, else a copy."""
    if target.exists() and target.samefile(source):
        return  # renaming one link of a file over another would leave both
    tmp_file = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with contextlib.suppress(OSError):
            os.link(source, tmp_file)
        if not tmp_file.exists():
            shutil.copyfile(source, tmp_file)
        os.replace(tmp_file, target)
    finally:
        tmp_file.unlink(missing_ok=True)
