"""The steps from a checkpoint to engines, as functions. `python -m export` and tests call them.

Comes in: a checkpoint, loaded or as a path. Goes out: an engine directory and its manifest. Each step imports torch, onnx or TensorRT only
when it needs them, so that importing this module is fast. Parses no arguments and serves nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from export.checkpoint.config import reader_preset
from export.errors import UsageError
from export.library.options import LibraryOptions
from serving.contract.limits import Limits

if TYPE_CHECKING:
    from export.checkpoint.files import Checkpoint
    from serving.contract.manifest import Manifest

TIMING_CACHE = Path("build/tensorrt-timing.cache")
PRECISIONS = ("float16", "bfloat16")  # of graphs for a GPU
PRECISION_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}  # as on the command line -> in a manifest
# Precisions of each engine; the first is its own.
PRECISIONS_OF = {
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
    "onnxruntime-gpu": PRECISIONS,
    "tensorrt": PRECISIONS,
}
GRAPHS = ("gemms", "whole")  # of a reader for a GPU


def require_reader_name(name: str) -> str:
    """The name, if a reader can be served under it.

    Raises:
        UsageError: if Triton or the names of the other two models do not allow it.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name.endswith(("_encoder", "_stream")):
        raise UsageError(f"reader name: wanted letters, digits, _ and -, not ending in _encoder or _stream, got {name!r}")
    return name


class CheckpointOptions(TypedDict, total=False):
    """Keyword arguments of `load_checkpoint`; None and a missing key mean its default."""

    tokenizer: str | None
    passage_length: int | None
    append_eos: bool | None
    cross_attention_bias: bool | None
    prompt_template: str | None
    prompt_template_without_title: str | None


def export_graphs(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    gpu: bool,
    precision: str = "float16",
    opset: int | None = None,
    whole_encoder: bool = False,
    graphs: str = GRAPHS[0],
    library: LibraryOptions | None = None,
) -> Manifest:
    """Write the ONNX graphs of a reader.

    Args:
        checkpoint: the reader and its tokenizer.
        directory: replaced if it exists.
        gpu: graphs for a GPU, in `precision`; else fp32 graphs for the CPU.
        precision: "float16" or "bfloat16"; for a GPU only.
        opset: None for the default: 18 for the CPU, 17 for a GPU, the newest that TensorRT 8.6 reads.
        whole_encoder: the encoder as one graph instead of its GEMMs; for a GPU only.
        graphs: for a GPU, "gemms" with our kernels between them, or "whole": encoder, cross_kv and decoder_step as one graph each.
        library: the encoder's GEMMs as library kernels instead of engines, and what is in FP8; for a GPU only.

    Raises:
        ExportError: if a graph differs from its specification, or the kernels do not support the reader's sizes.
        CheckpointError: if the tokenizer does not fit.
    """
    if gpu:
        from export.graphs.gpu import TENSORRT_OPSET, export_gpu_reader

        resolved, opset = (library or LibraryOptions()).resolved(), opset or TENSORRT_OPSET
        whole = graphs == "whole"
        return export_gpu_reader(checkpoint, directory, precision, opset, whole_encoder=whole_encoder, whole=whole, library=resolved)
    from export.graphs.onnx_export import OPSET, export_reader

    return export_reader(checkpoint, directory, opset or OPSET)


def build_reader(
    source: str,
    directory: Path,
    engine: str,
    limits: Limits,
    *,
    options: CheckpointOptions | None = None,
    precision: str | None = None,
    opset: int | None = None,
    whole_encoder: bool = False,
    graphs: str = GRAPHS[0],
    library: LibraryOptions | None = None,
    timing_cache: Path = TIMING_CACHE,
    jobs: int = 1,
    log: Callable[[str], None] = print,
) -> Manifest:
    """A checkpoint to engines of one kind.

    Args:
        source: checkpoint directory or hub name.
        directory: of the engines; replaced if it exists. Graphs for TensorRT are kept next to it, as `NAME.graphs`.
        engine: "tensorrt", "onnxruntime-gpu", "openvino", "onnxruntime", or "auto" for the fastest that this machine can run.
        limits: what TensorRT engines must serve; the other engines are the same for all limits.
        options: how to read the checkpoint.
        precision: one of the engine's; None for its own. "auto" takes an engine that has it.
        opset: as in `export_graphs`.
        whole_encoder: on a GPU, the encoder as one graph, for Triton's TensorRT backend.
        graphs: as in `export_graphs`.
        library: on a GPU, the encoder's GEMMs as library kernels instead of engines; its samples calibrate int8 on a CPU too.
        timing_cache: as in `build_engines`.
        jobs: processes that build TensorRT engines.
        log: called with each line of progress.

    Raises:
        UserError, ManifestError, EngineError: if a step fails. `directory` stays as it was then.
    """
    from export.manifest_writer import atomic_directory
    from serving.contract.manifest import CPU_ENGINES

    has_torch = importlib.util.find_spec("torch") is not None
    chooses = engine == "auto"
    samples = None if library is None else library.samples
    engine, precision = _chosen(engine, precision, samples, has_torch=has_torch)
    if engine in CPU_ENGINES:
        fixed = opset is not None or any(value is not None for value in (options or {}).values())
        with atomic_directory(directory) as tmp_dir:
            if has_torch:
                manifest = _exported(source, tmp_dir, options, opset)
            else:
                manifest = _without_torch(source, tmp_dir, fixed=fixed)
            return _for_cpu(tmp_dir, manifest, engine, precision, samples, chooses=chooses)
    if not has_torch:
        raise _needs_torch(source)
    from export.checkpoint.files import load_checkpoint

    checkpoint = load_checkpoint(source, **(options or {}))
    compiled = engine == "tensorrt"
    onnx = directory.with_name(f"{directory.name}.graphs") if compiled else directory
    manifest = export_graphs(
        checkpoint, onnx, gpu=True, precision=precision, opset=opset, whole_encoder=whole_encoder, graphs=graphs, library=library
    )
    if not compiled:
        return manifest
    from export.tensorrt.compiler import build_engines

    return build_engines(onnx, directory, limits, timing_cache, jobs, log)


def _chosen(engine: str, precision: str | None, samples: Path | None, *, has_torch: bool) -> tuple[str, str]:
    """The engine, without "auto", and its precision; checked before anything is exported.

    Raises:
        UsageError: if the engine does not have the precision, or what it needs is not there.
        EngineError: if this CPU would emulate the precision.
    """
    if engine == "auto":
        from export.tensorrt.detect import default_backend

        engine = default_backend() if has_torch else "onnxruntime"
        without = precision == "int8" and importlib.util.find_spec("openvino") is None  # ONNX Runtime has an int8 of its own
        if engine == "onnxruntime" and precision in PRECISIONS_OF["openvino"][1:] and not without:
            engine = "openvino"
    if precision is not None and precision not in PRECISIONS_OF[engine]:
        names = {long: short for short, long in PRECISION_NAMES.items()}
        has = ", ".join(names[found] for found in PRECISIONS_OF[engine])
        raise UsageError(f"precision: engine {engine} has {has}; got {names.get(precision, precision)}; another ENGINE may have it")
    precision = precision or PRECISIONS_OF[engine][0]
    if engine == "openvino":
        from export.graphs.openvino import require_openvino

        require_openvino(precision, samples)
    if (engine, precision) == ("onnxruntime", "int8"):
        from export.graphs.int8 import require_quantizer

        require_quantizer()
    return engine, precision


def _exported(source: str, directory: Path, options: CheckpointOptions | None, opset: int | None) -> Manifest:
    from export.checkpoint.files import load_checkpoint

    return export_graphs(load_checkpoint(source, **(options or {})), directory, gpu=False, opset=opset)


def _for_cpu(directory: Path, manifest: Manifest, engine: str, precision: str, samples: Path | None, *, chooses: bool) -> Manifest:
    """Exported graphs for the engine that was asked for, or for the faster one where OpenVINO is installed too."""
    if engine == "openvino":
        from export.graphs.openvino import for_openvino

        return for_openvino(directory, manifest, precision, samples)
    if precision == "int8":
        from export.graphs.openvino import for_onnxruntime_int8

        return for_onnxruntime_int8(directory, manifest)
    if chooses and importlib.util.find_spec("openvino") is not None:
        from export.graphs.openvino import for_the_faster

        return for_the_faster(directory, manifest)
    return manifest


def _without_torch(source: str, directory: Path, *, fixed: bool) -> Manifest:
    """The graphs of a checkpoint that carries their template.

    Raises:
        UsageError: if torch is needed.
    """
    from export.graphs.templates import TEMPLATE_FILE, fill_template

    if not fixed and Path(source, TEMPLATE_FILE).is_file():
        return fill_template(Path(source), directory)
    raise _needs_torch(source)


def _needs_torch(source: str) -> UsageError:
    return UsageError(f"{source}: exporting it needs torch, which is not installed; `make export` installs it, or `make setup FOR=export`")


def random_checkpoint(
    preset: str, tokenizer: Path, *, fido: bool, period: int | None, num_kv_heads: int | None, passage_length: int, seed: int
) -> Checkpoint:
    """A reader of published size with random weights, for benchmarks. The arguments are those of `reader_preset`.

    Raises:
        ConfigError: if there is no such size.
    """
    from export.checkpoint.files import Checkpoint
    from export.checkpoint.tokenizer import read_tokenizer
    from export.model.reader import Reader

    config = reader_preset(preset, fido=fido, period=period, num_kv_heads=num_kv_heads)
    reader = Reader(dataclasses.replace(config, passage_length=passage_length))
    reader.reset_parameters(seed)
    return Checkpoint(reader.eval(), read_tokenizer(tokenizer), f"random-{preset}", "random weights")


def convert(source: str, output: Path, period: int, num_kv_heads: int, options: CheckpointOptions | None = None) -> None:
    """Write a FiDO checkpoint in our own layout, initialised from a FiD checkpoint.

    Raises:
        UserError: if the checkpoint cannot be read or does not fit the period and the heads.
    """
    import torch

    from export.checkpoint.files import load_checkpoint, save_reader
    from export.checkpoint.weights import fido_from_fid

    checkpoint = load_checkpoint(source, **(options or {}))
    converted = fido_from_fid(checkpoint.reader, period, num_kv_heads)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer.json")
        tokenizer.write_text(checkpoint.tokenizer_json, encoding="utf-8")
        notes = {"converted_from": Path(source).name, "needs": "up-training"}
        save_reader(output, converted, tokenizer, torch.float32, notes)
