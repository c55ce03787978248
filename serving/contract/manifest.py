"""The manifest beside the engines: what the server must know of a checkpoint, and the hashes that tie the files together.

Written by export/, read here and by nothing else, so that serving needs neither torch nor the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from .gemms import StackSizes
from .tensors import EngineSizes

FORMAT = 4  # raised when a reader of an older manifest would misunderstand this one
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
ENGINE_NAMES = ("encoder", "cross_kv", "decoder_step")
SUFFIXES = {"onnxruntime": ".onnx", "onnxruntime-gpu": ".onnx", "tensorrt": ".plan"}  # of engine files, by what runs them


REBUILD = "`make export ENGINE=tensorrt` builds it again"


class ManifestError(ValueError):
    """Engine files that are missing, altered, or do not belong together."""


class EngineError(RuntimeError):
    """An engine that cannot be loaded or run here, or does not have the tensors of its manifest."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a question and a passage become encoder input.

    Attributes:
        template: with the fields {question}, {title} and {context}; everything of it up to {title} is never truncated.
        passage_length: tokens at most, the end token included.
        append_eos: whether the end token closes every input.
    """

    template: str
    passage_length: int
    append_eos: bool


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """What compiled engines were built with and for; they run nowhere else.

    Attributes:
        gpu: its name, as "NVIDIA H200".
        compute_capability: as "9.0".
        version: of the compiler, as "8.6.0".
        profiles: engine file -> its optimization profiles, each input name -> (min, opt, max) shapes.
        seconds: engine file -> build time.
    """

    gpu: str
    compute_capability: str
    version: str
    profiles: dict[str, list[dict[str, tuple[tuple[int, ...], ...]]]]
    seconds: dict[str, float]

    def require_here(self, what: str, gpu: str, compute_capability: str, version: str) -> None:
        """Refuse engines of another GPU or another TensorRT, which would fail to load or, worse, run slowly.

        Raises:
            EngineError: naming every difference.
        """
        here = {"gpu": gpu, "compute_capability": compute_capability, "version": version}
        names = {"gpu": "GPU", "compute_capability": "compute capability", "version": "TensorRT"}
        faults = [
            f"{names[key]}: built for {getattr(self, key)}, here {found}" for key, found in here.items() if getattr(self, key) != found
        ]
        if faults:
            raise EngineError(f"{what}: {'; '.join(faults)}; {REBUILD}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineBuild:
        """The inverse of dataclasses.asdict, through JSON."""
        profiles = {
            file: [{name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()} for profile in listed]
            for file, listed in fields["profiles"].items()
        }
        return cls(**{**fields, "profiles": profiles})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Attributes:
        reader: "fid" or "fido".
        engine: what runs the files: "onnxruntime" (CPU), "onnxruntime-gpu" or "tensorrt".
        precision: of weights and activations: "float32", "float16" or "bfloat16". GPU engines take and give hidden states in float16.
        files: name -> SHA-256 of every file that belongs to the engines.
        weights_sha256: of the checkpoint's weights: engines of one checkpoint share it.
        provenance: source, versions, opset; informative, not read by the server.
        encoder, decoder: sizes of the stacks that are cut into gemms (gemms.py), as those of a GPU are; None for whole graphs.
        build: of compiled engines, what they were built with and for: the server refuses them elsewhere.
    """

    reader: str
    engine: str
    precision: str
    sizes: EngineSizes
    prompt: Prompt
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int
    files: dict[str, str]
    weights_sha256: str
    provenance: dict[str, Any]
    encoder: StackSizes | None = None
    decoder: StackSizes | None = None
    build: EngineBuild | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the engines run on a GPU, with the decoder step in gemms (gemms.py)."""
        return self.engine != "onnxruntime"

    def engine_file(self, name: str) -> str:
        """File of the engine called `name`."""
        return name + SUFFIXES[self.engine]

    def to_json(self) -> str:
        """The text of manifest.json; it holds a hash of itself."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**fields, "sha256": _sha256_of_fields(fields)}, indent=2) + "\n"

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory`/manifest.json.

        Raises:
            ManifestError: if it is missing, not JSON, of another format, altered, or has other fields.
        """
        path = directory / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ManifestError(f"{path}: missing; `make export` makes the engines and their manifest") from None
        except (ValueError, OSError) as error:
            raise ManifestError(f"{path}: unreadable ({error}); `make export` makes it again") from error
        found = fields.get("format") if isinstance(fields, dict) else None
        if found != FORMAT:
            raise ManifestError(f"{path}: format: wanted {FORMAT}, got {found!r}; `make export` makes it again")
        wanted, actual = fields.pop("sha256", None), _sha256_of_fields(fields)
        if wanted != actual:
            raise ManifestError(f"{path}: its SHA-256: wanted {wanted}, got {actual}: it was altered; `make export` makes it again")
        del fields["format"]
        try:
            sizes = {**fields["sizes"], "cross_attention_layers": tuple(fields["sizes"]["cross_attention_layers"])}
            build = EngineBuild.from_dict(fields["build"]) if fields.get("build") else None
            stacks = {name: StackSizes(**fields[name]) for name in ("encoder", "decoder") if fields.get(name)}
            made = {"sizes": EngineSizes(**sizes), "prompt": Prompt(**fields["prompt"]), "build": build}
            return cls(**{**fields, **stacks, **made})
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{path}: other fields than wanted ({error}); `make export` makes it again") from error

    def verify(self, directory: Path, names: tuple[str, ...]) -> None:
        """Check that the files called `names` (or parts of them, as `encoder.onnx.data`) are there and unaltered.

        Raises:
            ManifestError: naming every missing and every altered file.
        """
        faults = []
        for name in names:
            if name not in self.files:
                faults.append(f"{name}: not in {MANIFEST_FILE}")
        for file, wanted in self.files.items():
            if file not in names and not any(file == f"{name}.data" for name in names):
                continue
            if not (directory / file).is_file():
                faults.append(f"{file}: missing")
            elif (found := sha256_of_file(directory / file)) != wanted:
                faults.append(f"{file}: SHA-256 wanted {wanted[:16]}..., got {found[:16]}...")
        if faults:
            raise ManifestError(
                f"{directory}: engine files do not match {MANIFEST_FILE}; `make export` makes them again:\n  " + "\n  ".join(faults)
            )


def _sha256_of_fields(fields: dict[str, Any]) -> str:
    """Hash of a manifest's content, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
