"""What a model repository holds: readers, their models, and what is said of each reader once it is served.

In: the files of the repository (config.pbtxt, manifest.json). Loads no engine and writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.contract.limits import Limits, LimitsError
from serving.contract.manifest import MANIFEST_FILE, Manifest, ManifestError

from .installation import ServerError

CONFIG_FILE = "config.pbtxt"
ENCODER, STREAM = "_encoder", "_stream"  # ends of a reader's other models' names


@dataclasses.dataclass(frozen=True)
class ServedReader:
    """One reader as it is served.

    Attributes:
        kind: "fid" or "fido".
        checkpoint: where its weights came from; "?" if the manifest does not say.
        parameters: how many weights it has; None if the manifest does not say.
        engine: what runs it, as "onnxruntime".
        precision: of its weights and activations.
        slots: questions decoded together by one process.
        max_passages: that a question may bring.
        why: the times by which its engine was chosen, as a sentence; empty where the user named the engine.
    """

    name: str
    kind: str
    checkpoint: str
    parameters: int | None
    engine: str
    precision: str
    slots: int
    max_passages: int
    why: str = ""


def models_of(readers: Sequence[str], *, stream: bool) -> list[str]:
    """Names of the models that serve these readers."""
    return [name for r in readers for name in (f"{r}{ENCODER}", r, *([f"{r}{STREAM}"] if stream else []))]


def known_readers(repository: Path) -> list[str]:
    """Readers of a repository: every model that has an encoder model."""
    names = {path.parent.name for path in repository.glob(f"*/{CONFIG_FILE}")}
    return sorted(name for name in names if f"{name}{ENCODER}" in names)


def exported_readers(repository: Path) -> list[str]:
    """Readers of a repository that have engines."""
    return [name for name in known_readers(repository) if list((repository / name).glob(f"*/{MANIFEST_FILE}"))]


def chosen_readers(words: Sequence[str], repository: Path) -> list[str]:
    """Names of readers from a command line, separated by blanks or commas, each once; without a name, all exported ones.

    Raises:
        ServerError: if the repository has no reader of a name; it lists those that it has.
    """
    names = list(dict.fromkeys(name for word in words for name in word.replace(",", " ").split()))
    known = exported_readers(repository)
    if not known:
        raise ServerError(f"{repository}: wanted exported readers, got none; `make export READER=name CHECKPOINT=path` makes one")
    names = names or known
    if unknown := [name for name in names if name not in known]:
        raise ServerError(f"--readers: wanted any of {', '.join(known)} (in {repository}), got {', '.join(unknown)}")
    return names


def model_config(repository: Path, model: str) -> Any:
    """A model's config.pbtxt as Triton's own message.

    Raises:
        ServerError: if the model is not in the repository, or its configuration cannot be read.
    """
    path = repository / model / CONFIG_FILE
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig(), allow_unknown_field=True)
    except FileNotFoundError:
        found = sorted(path.parent.name for path in repository.glob(f"*/{CONFIG_FILE}"))
        raise ServerError(f"model {model}: not in {repository}, which has {', '.join(found) or 'none'}") from None
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ServerError(f"{path}: cannot be read: {error}") from error


def has_python_process(repository: Path, model: str) -> bool:
    """Whether a model runs in a process of Triton's Python backend. A native backend runs inside tritonserver itself."""
    return str(model_config(repository, model).backend) == "python"


def served_reader(repository: Path, reader: str) -> ServedReader:
    """What is served under a reader's name.

    Raises:
        ServerError: if its configuration or its manifest cannot be read.
    """
    parameters = {key: {"string_value": value.string_value} for key, value in model_config(repository, reader).parameters.items()}
    versions = [path.parent for path in (repository / reader).glob(f"*/{MANIFEST_FILE}") if path.parent.name.isdigit()]
    try:
        limits = Limits.from_parameters(parameters)
        manifest = Manifest.load(max(versions, key=lambda path: int(path.name), default=repository / reader / "1"))
    except (LimitsError, ManifestError) as error:
        raise ServerError(f"{reader}: {error}") from error
    origin = manifest.provenance
    return ServedReader(
        name=reader,
        kind=manifest.reader,
        checkpoint=str(origin.get("source", "?")),
        parameters=origin.get("parameters"),
        engine=manifest.engine,
        precision=manifest.precision,
        slots=limits.slots,
        max_passages=limits.max_passages,
        why=_why(manifest.engine, origin.get("chosen_engine")),
    )


def _why(engine: str, chosen: Any) -> str:
    """Why export took an engine: what it measured (export/graphs/openvino.py)."""
    if not chosen:
        return ""
    times = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in sorted(chosen["question_ms"].items(), key=lambda item: item[1]))
    return f"{engine}; a question at export: {times} on {chosen['cpu']}"


def reader_table(readers: Sequence[ServedReader]) -> list[str]:
    """A heading and one line per reader."""
    rows = [("reader", "kind", "checkpoint", "parameters", "engine", "precision", "slots", "max passages")]
    for r in readers:
        size = "?" if r.parameters is None else f"{r.parameters / 1e6:,.1f} M"
        rows.append((r.name, r.kind, r.checkpoint, size, r.engine, r.precision, str(r.slots), str(r.max_passages)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
