"""The files of a checkpoint directory: which of them hold the weights, and their content.

Comes in: a path. Goes out: text, JSON or tensors, or one `CheckpointError` of one line that names the file. Weights are read as tensors
only, by `safetensors` or `torch.load(weights_only=True)`: no code in a pickle is run. Knows nothing of T5.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from export.errors import CheckpointError

# transformers' order. A variant such as pytorch_model.fp16.bin is never the main file.
MAIN_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.index.json")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES_SHOWN = 5
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def one_line(text: object) -> str:
    """The text of an error of another library, without its line breaks and with 200 characters at most."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def listed(names: Iterable[Any], shown: int = NAMES_SHOWN, separator: str = ", ") -> str:
    """The first names and the number of the others."""
    every = [str(name) for name in names]
    rest = f" and {len(every) - shown} more" if len(every) > shown else ""
    return separator.join(every[:shown]) + rest


def require_file(path: Path, hint: str = "") -> Path:
    """The path, if it is a file with content.

    Raises:
        CheckpointError: if it is missing, a folder, empty, a git-lfs pointer or a web page. `hint` follows "missing".
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: wanted a file, got a folder")
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: the link's target {path.readlink()} is missing; download it again")
    if not path.exists():
        raise CheckpointError(f"{path}: missing{hint and '; '}{hint}")
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: git-lfs pointer: run git lfs pull")
    if not head:
        raise CheckpointError(f"{path}: empty; download it again")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path}: a web page instead of the file; download it again")
    return path


def read_text(path: Path, hint: str = "") -> str:
    """The content of a UTF-8 file; raises CheckpointError as `require_file` does, or if it is not text."""
    try:
        return require_file(path, hint).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError as `read_text` does, or if it is none."""
    try:
        fields = json.loads(read_text(path, hint))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(fields).__name__}")
    return fields


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of the main weight file, which transformers' rule chooses, or of all shards of its index.

    Raises:
        CheckpointError: if there is none, a shard is missing, or a file holds anything but dense tensors of floating-point numbers.
    """
    main = next((directory / name for name in MAIN_WEIGHTS if (directory / name).exists() or (directory / name).is_symlink()), None)
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory / 'adapter_config.json'}: a PEFT adapter; merge it into its base model with merge_and_unload(), save that, "
            "and pass the merged directory"
        )
    if main is None:
        found = sorted({path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)})
        other = f"; found {listed(found)}, which transformers does not load without a variant or a conversion" if found else ""
        raise CheckpointError(f"{directory}: no weights; wanted {MAIN_WEIGHTS[0]}, {MAIN_WEIGHTS[2]}, or the index of their shards{other}")
    weights: dict[str, Tensor] = {}
    for file in _shards(main) if main.suffix == ".json" else [main]:
        weights.update(_tensors(file))
    return weights


def _shards(index: Path) -> list[Path]:
    """The files that an index names. The index must agree with itself and with the folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: weight_map: wanted an object of weight names and files, got {one_line(names)}")
    shards = sorted(set(names.values()))
    stray = [name for name in shards if Path(name).name != name]
    if stray:
        raise CheckpointError(f"{index}: weight_map: wanted files next to it, got {listed(stray)}")
    missing = [name for name in shards if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(shards)} shards are missing: {listed(missing)}; download them again")
    return [index.parent / name for name in shards]


def _tensors(file: Path) -> dict[str, Tensor]:
    require_file(file)
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(str(file))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about protocols of pickles; what torch cannot read is an error below
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot be read as tensors; download it again ({one_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError, whose text advises to run the pickle's code
        raise CheckpointError(f"{file}: wanted a file of tensors only, got a truncated file or a pickle of other objects") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: wanted a dictionary of tensors, got {type(content).__name__}; save model.state_dict()")
    stray = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if stray:
        raise CheckpointError(f"{file}: wanted names and tensors only, got other keys or values: {listed(stray)}; save model.state_dict()")
    for name, tensor in content.items():
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{file}: {name}: wanted a dense tensor, got {tensor.layout}; save it with to_dense()")
        if tensor.is_quantized or tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {name}: wanted float32, float16, bfloat16 or float64, got {tensor.dtype}; quantised weights are not read: "
                "export the model before it was quantised"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{file}: {name}: a meta tensor without numbers; save the loaded model")
    return content
