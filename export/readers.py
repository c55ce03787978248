"""`make export`: named readers brought up to date, from checkpoint to model repository, and nothing done where nothing has changed.

Comes in: a name, a checkpoint and settings. Goes out: engines in `ENGINES/NAME`, models in the repository, and a stamp per reader,
`ENGINES/NAME.stamp.json`. The stamp records all inputs of each step and the files that it wrote. A step runs again if an input differs, or
if one of its files was changed or removed. Checking the stamps imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from export.build import TIMING_CACHE, CheckpointOptions, build_reader
from export.library.options import AUTO, LibraryOptions
from export.tensorrt.detect import cuda_gpu
from serving.contract.limits import Limits

ROOT = Path(__file__).parents[1]
CODE = ("export", "serving/contract")
# Engines depend on the first three; `--engine auto` chooses by the others. Absent ones count as None.
PACKAGES = ("torch", "onnx", "onnxscript", "tensorrt", "polygraphy", "cupy-cuda12x", "cupy-cuda13x", "onnxruntime", "onnxruntime-gpu")
KERNEL_PACKAGES = ("quack-kernels", "nvidia-cutlass-dsl")  # that library kernels are compiled with


@dataclasses.dataclass(frozen=True)
class Settings:
    """How readers are exported and served.

    Attributes:
        engines: directory with one folder of engines per reader.
        repository: the model repository.
        engine: as in `build_reader`, "auto" included.
        native_encoder: the encoder is served by Triton's own TensorRT backend.
        limits: written into the configurations; TensorRT engines are built for them.
        precision: on a GPU.
        jobs: processes that build TensorRT engines.
        library: the encoder's GEMMs on a GPU.
    """

    engines: Path
    repository: Path
    engine: str = "auto"
    native_encoder: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)
    precision: str = "float16"
    timing_cache: Path = TIMING_CACHE
    jobs: int = 1
    library: LibraryOptions = dataclasses.field(default_factory=lambda: LibraryOptions(AUTO))  # as on the command line


def update_reader(
    name: str, checkpoint: str, settings: Settings, options: CheckpointOptions | None = None, log: Callable[[str], None] = print
) -> bool:
    """Bring one reader up to date and log one line about it, before the lines of a TensorRT build.

    Args:
        name: to serve under.
        checkpoint: directory or hub name. A hub name is taken to mean the same checkpoint every time.
        settings: for all readers.
        options: how to read the checkpoint.
        log: called with each line.

    Returns:
        Whether anything was made.

    Raises:
        UserError, ManifestError, EngineError: if a step fails. Its stamp is not written then, so that it runs again.
    """
    stamp_file = settings.engines / f"{name}.stamp.json"
    stamp = _read_stamp(stamp_file)
    inputs = _engine_inputs(checkpoint, settings, options or {})
    directory, started, done = settings.engines / name, time.perf_counter(), []

    # engines for a CPU are the same for all limits
    on_gpu = stamp.get("engine") != "onnxruntime"
    limits = dataclasses.asdict(settings.limits)
    if stamp.get("inputs") != inputs or (on_gpu and stamp.get("engine_limits") != limits) or not _unchanged(stamp.get("engine_files")):
        stamp_file.unlink(missing_ok=True)
        manifest = build_reader(
            checkpoint,
            directory,
            settings.engine,
            settings.limits,
            options=options,
            precision=settings.precision,
            whole_encoder=settings.native_encoder,
            library=settings.library,
            timing_cache=settings.timing_cache,
            jobs=settings.jobs,
            log=log,
        )
        stamp = {"inputs": inputs, "engine": manifest.engine, "engine_limits": limits, "engine_files": _states(directory.iterdir())}
        _write_stamp(stamp_file, stamp)
        size = sum(path.stat().st_size for path in directory.iterdir()) / 1e6
        parameters = manifest.provenance["parameters"]
        done.append(f"{checkpoint} exported, {manifest.engine} {manifest.precision}, {parameters:,} parameters, {size:.1f} MB")

    served = {"repository": str(settings.repository.resolve()), "native_encoder": settings.native_encoder, "limits": limits}
    if done or stamp.get("served") != served or not _unchanged(stamp.get("model_files")):
        from export.repository import repository_from_engines

        files = repository_from_engines(directory, settings.repository, name, settings.limits, native_encoder=settings.native_encoder)
        stamp |= {"served": served, "model_files": _states(files)}
        _write_stamp(stamp_file, stamp)
        done.append(f"models in {settings.repository}")
    log(f"{name}: {'; '.join(done)}; {time.perf_counter() - started:.1f} s" if done else f"{name}: up to date")
    return bool(done)


def exported_before(engines: Path) -> dict[str, tuple[str, CheckpointOptions]]:
    """Name -> checkpoint and options of every reader that has a stamp in `engines`, by name."""
    found: dict[str, tuple[str, CheckpointOptions]] = {}
    for path in sorted(engines.glob("*.stamp.json")):
        inputs = _read_stamp(path).get("inputs", {})
        if inputs.get("checkpoint"):
            found[path.name.removesuffix(".stamp.json")] = (inputs["checkpoint"][0], inputs.get("options", {}))
    return found


def _engine_inputs(checkpoint: str, settings: Settings, options: CheckpointOptions) -> dict[str, Any]:
    """Everything that the engines are made from, as JSON has it, except the limits."""
    tokenizer = options.get("tokenizer")
    return {
        "checkpoint": [checkpoint, _states(_files(Path(checkpoint)))],
        "tokenizer": [tokenizer, _states(_files(Path(tokenizer)))] if tokenizer else None,
        "options": {name: value for name, value in options.items() if value is not None},
        "engine": settings.engine,
        "precision": settings.precision,
        "native_encoder": settings.native_encoder,
        "library": [settings.library.architecture, settings.library.precision, settings.library.cross_kv],
        "samples": _states(_files(settings.library.samples)) if settings.library.samples else None,
        "code": _code_hash(),
        "packages": {package: _version(package) for package in (*PACKAGES, *KERNEL_PACKAGES)},
        "gpu": None if (gpu := cuda_gpu()) is None else dataclasses.asdict(gpu),
    }


def _files(place: Path) -> list[Path]:
    """The files of a directory, a file itself, or nothing for a hub name."""
    if place.is_dir():
        return [path for path in place.iterdir() if path.is_file()]
    return [place] if place.is_file() else []


def _states(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, bytes and time of change in nanoseconds of each file, in order of the paths."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]


def _unchanged(states: list[list[Any]] | None) -> bool:
    """Whether files were recorded, and all of them are as they were."""
    try:
        return bool(states) and _states(Path(path) for path, *_ in states or []) == states
    except OSError:
        return False


def _code_hash() -> str:
    """Of the source that decides what an export writes."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_stamp(path: Path) -> dict[str, Any]:
    """A stamp, or an empty one where it is missing or unreadable."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(path: Path, stamp: dict[str, Any]) -> None:
    from export.manifest_writer import write_atomically

    write_atomically(path, (json.dumps(stamp, indent=1) + "\n").encode())
