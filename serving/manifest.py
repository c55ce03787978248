"""The manifest beside the engines: what the server must know of a checkpoint, and the hashes that tie the files together.

Written by export/, read here and by nothing else, so that serving needs neither torch nor the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from .tensors import EngineSizes

FORMAT = 1  # raised when a reader of an older manifest would misunderstand this one
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
ENGINE_NAMES = ("encoder", "cross_kv", "decoder_step")


class ManifestError(ValueError):
    """Engine files that are missing, altered, or do not belong together."""


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
class Manifest:
    """Contents of manifest.json.

    Attributes:
        reader: "fid" or "fido".
        engine: what runs the files: "onnxruntime".
        precision: of weights and activations: "float32".
        files: name -> SHA-256 of every file that belongs to the engines.
        weights_sha256: of the checkpoint's weights: engines of one checkpoint share it.
        provenance: source, versions, opset; informative, not read by the server.
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

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory`/manifest.json.

        Raises:
            ManifestError: if it is missing, not JSON, of another format, or has other fields.
        """
        path = directory / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ManifestError(f"{path}: missing; `make export` makes the engines and their manifest") from None
        except (ValueError, OSError) as error:
            raise ManifestError(f"{path}: unreadable ({error}); `make export` makes it again") from error
        found = fields.pop("format", None) if isinstance(fields, dict) else None
        if found != FORMAT:
            raise ManifestError(f"{path}: format: wanted {FORMAT}, got {found!r}; `make export` makes it again")
        try:
            sizes = {**fields["sizes"], "cross_attention_layers": tuple(fields["sizes"]["cross_attention_layers"])}
            return cls(**{**fields, "sizes": EngineSizes(**sizes), "prompt": Prompt(**fields["prompt"])})
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


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
