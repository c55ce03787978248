"""A checkpoint's CPU graphs without torch: the exported files, cut into what the checkpoint has and what it has not.

A graph file holds every weight as one run of bytes: a tensor of the checkpoint in fp32, transposed, or several side by side. A template
keeps the other bytes, some kilobytes, and names the tensors. Filling it joins both and gives the exported files, byte for byte, which their
hashes in the manifest prove. The demo readers carry one, so that a demo needs no torch.

`python -m export.graphs.templates CHECKPOINT ENGINES` writes the template of a checkpoint from its exported graphs.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import lzma
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import CheckpointError
from export.manifest_writer import atomic_directory, write_atomically, write_manifest
from serving.contract.manifest import ENGINE_NAMES, MANIFEST_FILE, TOKENIZER_FILE, Manifest, ManifestError

TEMPLATE_FILE = "graphs.json.xz"
WEIGHTS_FILE = "model.safetensors"  # of this project's own checkpoints
SMALLEST = 256  # bytes of a weight that is worth naming
# Tensors that a graph holds side by side, transposed: the last parts of their names.
JOINED = (("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1"))


def write_template(checkpoint: Path, engines: Path) -> Path:
    """Write the template of a checkpoint.

    Args:
        checkpoint: directory in this project's own layout.
        engines: what `export` wrote for it, for the CPU.

    Returns:
        The file, in `checkpoint`.
    """
    manifest = Manifest.load(engines)
    weights = dict(_arrays(_tensors(checkpoint)))
    graphs = {name: _cut((engines / f"{name}.onnx").read_bytes(), weights) for name in ENGINE_NAMES}
    text = json.dumps({"manifest": json.loads(manifest.to_json()), "graphs": graphs})
    write_atomically(checkpoint / TEMPLATE_FILE, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return checkpoint / TEMPLATE_FILE


def fill_template(checkpoint: Path, directory: Path) -> Manifest:
    """Write the graphs of a checkpoint that carries a template, their tokenizer and the manifest: all of them or none.

    Args:
        checkpoint: directory in this project's own layout.
        directory: replaced if it exists.

    Raises:
        CheckpointError: if the template is damaged, or of other weights. `directory` stays as it was then.
    """
    path = checkpoint / TEMPLATE_FILE
    try:
        template = json.loads(lzma.decompress(path.read_bytes()))
        tensors = _tensors(checkpoint)
        with atomic_directory(directory) as tmp_dir:
            for name, parts in template["graphs"].items():
                (tmp_dir / f"{name}.onnx").write_bytes(b"".join(_filled(parts, tensors)))
            shutil.copyfile(checkpoint / TOKENIZER_FILE, tmp_dir / TOKENIZER_FILE)
            (tmp_dir / MANIFEST_FILE).write_text(json.dumps(template["manifest"]), encoding="utf-8")
            manifest = write_manifest(Manifest.load(tmp_dir), tmp_dir)
            manifest.verify(tmp_dir, tuple(manifest.files))
    except (lzma.LZMAError, KeyError, TypeError, ValueError, OSError, ManifestError) as error:
        advice = "install torch (make setup FOR=export) and export the checkpoint, or restore both files"
        raise CheckpointError(f"{path}: does not fit {WEIGHTS_FILE} beside it: {error}; {advice}") from error
    return manifest


def _tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(checkpoint / WEIGHTS_FILE))


def _arrays(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The bytes of every form in which a graph may hold a weight, and how to make them, the longest first."""
    made = [{"names": [name], "transposed": transposed} for name in tensors for transposed in (False, True)]
    for name in tensors:
        for kinds in JOINED:
            names = [name.replace(f".{kinds[0]}.", f".{kind}.") for kind in kinds]
            if len({*names}) == len(kinds) and all(other in tensors for other in names):
                made.append({"names": names, "transposed": True})
    arrays = {_bytes(how, tensors): how for how in made}
    return iter(sorted(((data, how) for data, how in arrays.items() if len(data) >= SMALLEST), key=lambda item: -len(item[0])))


def _bytes(how: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    arrays = [tensors[name].astype(np.float32) for name in how["names"]]
    arrays = [array.T for array in arrays] if how["transposed"] else arrays
    return np.ascontiguousarray(np.concatenate(arrays, axis=-1)).tobytes()


def _cut(content: bytes, weights: Mapping[bytes, dict[str, Any]]) -> list[Any]:
    """A file as parts in order: base64 text of bytes to copy, or how to make a weight."""
    found: list[tuple[int, int, dict[str, Any]]] = []
    for data, how in weights.items():
        place = content.find(data)
        while place >= 0:
            if all(place >= end or place + len(data) <= start for start, end, _ in found):
                found.append((place, place + len(data), how))
            place = content.find(data, place + len(data))
    found.sort(key=lambda item: item[0])
    edges = [0, *itertools.chain.from_iterable((start, end) for start, end, _ in found), len(content)]
    copied = [base64.b64encode(content[start:end]).decode() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [part for pair in itertools.zip_longest(copied, [how for *_, how in found]) for part in pair if part is not None]


def _filled(parts: list[Any], tensors: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    for part in parts:
        yield base64.b64decode(part) if isinstance(part, str) else _bytes(part, tensors)


def main() -> None:
    """Write the template of one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m export.graphs.templates", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engines", type=Path)
    arguments = parser.parse_args()
    path = write_template(arguments.checkpoint, arguments.engines)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
