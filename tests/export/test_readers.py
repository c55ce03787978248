"""`python -m export readers`: what has changed is made again, and nothing else; the steps themselves are stand-ins where they take long."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from export import readers
from export.errors import ExportError
from export.manifest_writer import atomic_directory, write_manifest
from export.readers import Settings, update_reader
from export.tensorrt.detect import Gpu
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, Prompt, sha256_of_file
from serving.contract.tensors import EngineSizes

FILES = ("encoder.onnx", "cross_kv.onnx", "decoder_step.onnx", "tokenizer.json")
SIZES = EngineSizes(8, 8, 1, (0,), 1, 1, 8, 97)


def write_engines(directory: Path) -> Manifest:
    with atomic_directory(directory) as tmp_dir:
        for file in FILES:
            (tmp_dir / file).write_text(file)
        files = {file: sha256_of_file(tmp_dir / file) for file in FILES}
        prompt = Prompt("{question}{title}{context}", 16, True)
        manifest = Manifest("fid", "onnxruntime", "float32", SIZES, prompt, 0, 1, 0, files, "w", {"parameters": 1})
        return write_manifest(manifest, tmp_dir)


class Update:
    """Updates a reader called nq with stand-in engines; a call returns the steps that ran, "engines" and "models"."""

    def __init__(self, root: Path):
        self.root, self.checkpoint, self.auto = root, root / "check point", "onnxruntime"
        self.checkpoint.mkdir()
        (self.checkpoint / "config.json").write_text("{}")
        self.settings = Settings(root / "engines", root / "repository")
        self.steps: list[str] = []

    def build_reader(self, source: str, directory: Path, engine: str, limits: Limits, **_: object) -> Manifest:
        self.steps.append("engines")
        return dataclasses.replace(write_engines(directory), engine=self.auto if engine == "auto" else engine)

    def __call__(self, options: Any = None, source: Path | None = None, **changes: Any) -> list[str]:
        self.steps.clear()
        lines: list[str] = []
        settings = dataclasses.replace(self.settings, **changes)
        made = update_reader("nq", str(source or self.checkpoint), settings, options, lines.append)
        assert len(lines) == 1 and lines[0].startswith("nq: ") and made == ("up to date" not in lines[0])
        return [*self.steps, *(["models"] if "models in" in lines[0] else [])]


@pytest.fixture
def update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Update:
    update = Update(tmp_path)
    monkeypatch.setattr(readers, "build_reader", update.build_reader)
    return update


def touch(path: Path, text: str) -> None:
    """Write a file so that its time of change differs, however coarse the clock."""
    path.write_text(text)
    later = time.time_ns() + 10**9
    os.utime(path, ns=(later, later))


def test_the_second_run_does_nothing(update):
    assert update() == ["engines", "models"]
    assert update() == []
    assert (update.root / "repository" / "nq" / "1" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "changed",
    [
        {"engine": "onnxruntime"},
        {"precision": "bfloat16"},
        {"graphs": "whole"},
        {"native_encoder": False, "options": {"append_eos": True}},
        {"options": {"tokenizer": "elsewhere"}},
        {"options": {"passage_length": 250}},
    ],
)
def test_other_settings_make_the_engines_again(update, changed):
    update()
    assert update(**changed) == ["engines", "models"]
    assert update(**changed) == []


def test_a_changed_checkpoint_makes_the_engines_again(update):
    update()
    touch(update.checkpoint / "config.json", "[]")  # of the same size
    assert update() == ["engines", "models"]
    (update.checkpoint / "model.safetensors").write_text("w")
    assert update() == ["engines", "models"]
    (update.checkpoint / "model.safetensors").unlink()
    assert update() == ["engines", "models"]
    assert update() == []
    assert update(source=update.root / "other") == ["engines", "models"]


def test_a_changed_tokenizer_file_makes_the_engines_again(update):
    tokenizer = update.root / "tokenizer.json"
    tokenizer.write_text("a")
    options = {"tokenizer": str(tokenizer)}
    update(options)
    assert update(options) == []
    touch(tokenizer, "b")
    assert update(options) == ["engines", "models"]


def test_other_code_packages_or_gpu_make_the_engines_again(update, monkeypatch):
    update()
    with monkeypatch.context() as changed:
        changed.setattr(readers, "_version", lambda package: "9" if package == "torch" else None)
        assert update() == ["engines", "models"]
    update()
    with monkeypatch.context() as changed:
        changed.setattr(readers, "cuda_gpu", lambda: Gpu("NVIDIA H100", "9.0", "13.0"))
        assert update() == ["engines", "models"]
    update()
    code = update.root / "code"
    (code / "export").mkdir(parents=True)
    (code / "export" / "a.py").write_text("1")
    with monkeypatch.context() as changed:
        changed.setattr(readers, "ROOT", code)
        assert update() == ["engines", "models"]
        assert update() == []
        (code / "export" / "a.py").write_text("2")
        assert update() == ["engines", "models"]


def test_other_limits_make_the_configurations_again_and_tensorrt_engines_too(update):
    update()
    assert update(limits=Limits(slots=3)) == ["models"]
    assert update(limits=Limits(slots=3)) == []
    update.auto = "onnxruntime-gpu"
    (update.root / "engines" / "nq" / "encoder.onnx").unlink()
    assert update(limits=Limits(slots=3)) == ["engines", "models"]
    assert update(limits=Limits(slots=4)) == ["engines", "models"]


def test_what_was_removed_or_edited_is_made_again(update):
    update()
    (update.root / "engines" / "nq" / "tokenizer.json").unlink()
    assert update() == ["engines", "models"]
    (update.root / "repository" / "nq_stream" / "config.pbtxt").unlink()
    assert update() == ["models"]
    touch(update.root / "repository" / "nq" / "config.pbtxt", "edited")
    assert update() == ["models"]
    (update.root / "engines" / "nq.stamp.json").write_text("{")
    assert update() == ["engines", "models"]
    assert update(repository=update.root / "elsewhere") == ["models"]


def test_a_step_that_failed_runs_again(update, monkeypatch):
    update()
    touch(update.checkpoint / "config.json", "other")

    def fail(*_: object, **__: object) -> None:
        raise ExportError("no")

    with monkeypatch.context() as broken:
        broken.setattr(readers, "build_reader", fail)
        with pytest.raises(ExportError):
            update()
    assert update() == ["engines", "models"]
    touch(update.checkpoint / "config.json", "yet another")
    with monkeypatch.context() as broken:
        broken.setattr("export.repository.repository_from_engines", fail)
        with pytest.raises(ExportError):
            update()
    assert update() == ["models"]


def test_an_up_to_date_run_imports_the_standard_library_only(update):
    options = {"tokenizer": None, "passage_length": 20, "append_eos": None, "cross_attention_bias": None}
    for name in ("nq", "trivia"):
        settings = Settings(update.root / "engines", update.root / "repository")
        update_reader(name, str(update.checkpoint), settings, options, lambda _: None)
    command = ["readers", *(f"{name}={update.checkpoint}" for name in ("nq", "trivia"))]
    command += [f"--{what}={update.root / what}" for what in ("engines", "repository")]
    command += [word for name in ("nq", "trivia") for word in ("--flags", f"{name}=--passage-length 20")]
    code = f"""import sys
before = set(sys.modules)
from export.__main__ import main
code = main({command!r})
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
sys.exit(code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    assert lines == ["nq: up to date", "trivia: up to date"]
    assert set(json.loads(modules.replace("'", '"'))) == {"export", "serving"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nq"], "wanted NAME=CHECKPOINT, got 'nq'"),
        (["nq="], "wanted NAME=CHECKPOINT, got 'nq='"),
        (["a b=x"], "reader name: wanted letters, digits, _ and -"),
        (["nq_stream=x"], "not ending in _encoder or _stream, got 'nq_stream'"),
        (["nq=x", "nq=y"], "nq is given twice"),
        (["nq=x", "--flags", "fid=--append-eos"], "--flags: wanted the name of a reader (nq), got fid"),
        (["nq=./nowhere"], "./nowhere: wanted a directory"),
    ],
)
def test_wrong_readers_are_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path):
    command = [sys.executable, "-m", "export", "readers", *arguments, f"--engines={tmp_path}/e", f"--repository={tmp_path}/r"]
    done = subprocess.run([*command, "--engine=onnxruntime"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.rglob("*.onnx"))
