"""Engines -> Triton model repository: config.pbtxt rendered from the tensor specs and the limits, engine files put in their places.

The configurations are committed, so that what is served can be reviewed; the engines beside them are not.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.contract.call_sizes import encoder_batch
from serving.contract.gemms import ARRAYS, array_file
from serving.contract.limits import Limits
from serving.contract.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, ManifestError
from serving.contract.tensors import READER_TENSORS, EngineSizes, GraphTensors, encoder_tensors

READERS = ("fid", "fido")
VERSION = "1"
NATIVE_ENGINE = "model.plan"  # what Triton's TensorRT backend looks for
HEADER = "# Rendered by `python -m export repository` from serving/contract/{tensors,limits}.py: change those, not this.\n"
MODEL_FILES = {
    "encoder": '"""Triton entry point of the encoder model."""\n\n'
    "from serving.triton.encoder_model import EncoderModel as TritonPythonModel  # noqa: F401\n",
    "reader": '"""Triton entry point of the reader: the chain behind one request."""\n\n'
    "from serving.triton.reader_model import ReaderModel as TritonPythonModel  # noqa: F401\n",
}
# Which engine files each model's version folder holds, besides the manifest. The stream model reads those of the unary one.
ENGINE_FILES = {
    "encoder": ("encoder", *(Path(array_file("encoder", name)).stem for name in ARRAYS)),
    "reader": ("cross_kv", "decoder_step", "decoder", *(Path(array_file("decoder", name)).stem for name in ARRAYS)),
    "stream": (),
}


def model_names(reader: str) -> dict[str, str]:
    """Role -> name of the models that serve a reader."""
    return {"encoder": f"{reader}_encoder", "reader": reader, "stream": f"{reader}_stream"}


def render_config(fields: dict[str, Any]) -> str:
    """config.pbtxt from a dictionary; Triton's own protobuf refuses unknown fields and wrong types."""
    config = json_format.ParseDict(fields, ModelConfig())
    text = text_format.MessageToString(config)
    # proto3 leaves out a zero, but Triton takes a missing max_batch_size for "complete it yourself"
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
    """`<reader>_encoder`: a passage is one element of Triton's batch, so the dynamic batcher joins questions."""
    names = ("intra_op_threads", *(("max_passages", "encoder_batch") if on_gpu else ()))
    return {
        **_common(
            model_names(reader)["encoder"],
            limits.to_parameters(names),
            on_gpu=on_gpu,
            instances=limits.encoder_instances if on_gpu else 1,  # on a CPU one engine call has all cores
        ),
        **_io(encoder_tensors(sizes, "float16" if on_gpu else "float32"), batched=True),
        # the largest question must fit in one batch
        "max_batch_size": encoder_batch(limits) if on_gpu else limits.max_passages,
        "dynamic_batching": {},
    }


def native_encoder_config(reader: str, sizes: EngineSizes, limits: Limits) -> dict[str, Any]:
    """`<reader>_encoder` for Triton's own TensorRT backend, as NVIDIA's container has it: no Python between the batcher and the engine."""
    config = encoder_config(reader, sizes, limits, on_gpu=True)
    del config["parameters"]
    return config | {
        "backend": "tensorrt",
        "default_model_filename": NATIVE_ENGINE,
        "instance_group": [{"kind": "KIND_GPU", "count": 1, "gpus": [0], "profile": ["0"]}],
        # waits a little for passages of other questions: a full batch costs less a passage
        "dynamic_batching": {"max_queue_delay_microseconds": 1000},
    }


def reader_config(reader: str, limits: Limits, *, stream: bool, on_gpu: bool = False) -> dict[str, Any]:
    """`<reader>` (one response) or `<reader>_stream` (decoupled); neither batches in Triton, since the decode loop does."""
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


def write_models(
    repository: Path, reader: str, sizes: EngineSizes, limits: Limits, *, on_gpu: bool = False, native_encoder: bool = False
) -> None:
    """Write config.pbtxt and 1/model.py of a reader's three models; what has not changed is left as it is."""
    configs = {
        "encoder": native_encoder_config(reader, sizes, limits) if native_encoder else encoder_config(reader, sizes, limits, on_gpu=on_gpu),
        "reader": reader_config(reader, limits, stream=False, on_gpu=on_gpu),
        "stream": reader_config(reader, limits, stream=True, on_gpu=on_gpu),
    }
    for role, name in model_names(reader).items():
        _write(repository / name / "config.pbtxt", render_config(configs[role]))
        if role == "encoder" and native_encoder:
            (repository / name / VERSION).mkdir(parents=True, exist_ok=True)
            (repository / name / VERSION / "model.py").unlink(missing_ok=True)
            continue
        _write(repository / name / VERSION / "model.py", MODEL_FILES["encoder" if role == "encoder" else "reader"])


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def repository_from_engines(engines: Path, repository: Path, reader: str, limits: Limits, *, native_encoder: bool = False) -> None:
    """Render a reader's models and place its engines in them.

    Args:
        engines: directory that `export_reader` wrote.
        repository: the model repository.
        reader: "fid" or "fido", the name to serve under.
        limits: written into the configurations.
        native_encoder: serve the encoder by Triton's own TensorRT backend, which NVIDIA's container has and the wheel has not.

    Raises:
        ManifestError: if the engine files are not those of their manifest, or not TensorRT's for a native encoder. Nothing is written then.
    """
    manifest = Manifest.load(engines)
    manifest.verify(engines, tuple(manifest.files))
    if native_encoder and manifest.engine != "tensorrt":
        raise ManifestError(
            f"{engines}: wanted TensorRT engines for Triton's tensorrt backend, got {manifest.engine}; `make export ENGINE=tensorrt`"
        )
    if native_encoder != (manifest.on_gpu and manifest.encoder is None):
        wanted, flag = ("one graph", "with") if native_encoder else ("its gemms", "without")
        raise ManifestError(
            f"{engines}: wanted the encoder as {wanted}; export {flag} --whole-encoder (`make export TRITON_BACKEND=...` does)"
        )
    write_models(repository, reader, manifest.sizes, limits, on_gpu=manifest.on_gpu, native_encoder=native_encoder)
    for role, name in model_names(reader).items():
        folder = repository / name / VERSION
        stems = ENGINE_FILES[role]
        files = [file for file in manifest.files if file.split(".")[0] in stems]
        if role == "reader":
            files.append(TOKENIZER_FILE)
        if role != "stream":
            # the manifest last: until it is there, the folder does not load
            for file in (*files, MANIFEST_FILE):
                native = native_encoder and role == "encoder" and file == manifest.engine_file("encoder")
                _link_or_copy(engines / file, folder / (NATIVE_ENGINE if native else file))


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows it, else a copy; moved into place in one step."""
    beside = target.with_name(f".{target.name}.new")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    os.replace(beside, target)
