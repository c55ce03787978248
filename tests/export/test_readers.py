"""`python -m export readers`: what has changed is made again, and nothing else; the steps themselves are stand-ins where they take long."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export import build, readers
from export.build import build_reader
from export.errors import ExportError, UsageError
from export.graphs import openvino as graphs
from export.manifest_writer import atomic_directory, write_manifest
from export.readers import Settings, update_reader
from export.tensorrt.detect import Gpu
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, Prompt, require_bf16, sha256_of_file
from serving.contract.tensors import EngineSizes
from serving.engines.load import load_encoder
from serving.pipeline.in_process import InProcessReader
from tests.conftest import WITHOUT_BF16, WITHOUT_OPENVINO

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
        {"engine": "openvino"},
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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_for_a_cpu_are_the_same_for_all_limits(update, engine):
    update(engine=engine)
    assert update(engine=engine, limits=Limits(slots=3)) == ["models"]


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


HALF = "onnxruntime-gpu"


@pytest.mark.parametrize(
    ("engine", "precision", "best", "wanted"),
    [
        ("onnxruntime", None, "tensorrt", ("onnxruntime", "float32")),
        ("openvino", None, "tensorrt", ("openvino", "float32")),
        ("openvino", "bfloat16", "tensorrt", ("openvino", "bfloat16")),
        ("auto", None, "onnxruntime", ("onnxruntime", "float32")),
        ("auto", "bfloat16", "onnxruntime", ("openvino", "bfloat16")),
        ("auto", "int8", "onnxruntime", ("openvino", "int8")),
        ("onnxruntime", "int8", "tensorrt", ("onnxruntime", "int8")),
        ("auto", "bfloat16", "tensorrt", ("tensorrt", "bfloat16")),
        ("auto", None, HALF, (HALF, "float16")),
        ("onnxruntime", "bfloat16", "tensorrt", "precision: engine onnxruntime has fp32, int8; got bf16"),
        ("openvino", "float16", "tensorrt", "precision: engine openvino has fp32, bf16, int8; got fp16"),
        ("auto", "float16", "onnxruntime", "precision: engine onnxruntime has fp32, int8; got fp16"),
        ("tensorrt", "float32", "tensorrt", "precision: engine tensorrt has fp16, bf16; got fp32"),
    ],
)
def test_an_engine_and_a_precision_are_chosen_before_anything_is_exported(engine, precision, best, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr("export.tensorrt.detect.default_backend", lambda: best)
    monkeypatch.setattr("export.graphs.openvino.require_openvino", lambda *_: None)
    monkeypatch.setattr("export.build.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: object())))
    if isinstance(wanted, tuple):
        assert build._chosen(engine, precision, None, has_torch=True) == wanted
    else:
        with pytest.raises(UsageError, match=wanted):
            build_reader("./nowhere", tmp_path / "engines", engine, Limits(), precision=precision)


def test_openvino_is_refused_by_name_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("export.graphs.openvino.importlib.util.find_spec", lambda name: object() if name == "torch" else None)
    with pytest.raises(UsageError, match=r"engine openvino: not installed; `make setup FOR=openvino` installs it"):
        build_reader("./nowhere", tmp_path / "engines", "openvino", Limits())


def test_bf16_is_refused_before_anything_is_exported_where_it_would_be_emulated(monkeypatch, tmp_path):
    monkeypatch.setattr("export.graphs.openvino.importlib.util.find_spec", lambda name: object())
    (tmp_path / "cpuinfo").write_text("model name : Old CPU\nflags : avx2\n")
    monkeypatch.setattr("export.graphs.openvino.require_bf16", lambda what: require_bf16(what, tmp_path / "cpuinfo"))
    with pytest.raises(EngineError, match=r"engine openvino: bf16: wanted a CPU with avx512_bf16 or amx_bf16, got Old CPU without them"):
        build_reader("./nowhere", tmp_path / "engines", "openvino", Limits(), precision="bfloat16")


@pytest.mark.parametrize(
    ("onnxruntime", "openvino", "wanted"), [(100.0, 80.0, "openvino"), (100.0, 95.0, "onnxruntime"), (80.0, 100.0, "onnxruntime")]
)
def test_the_faster_engine_is_kept_with_its_times(tmp_path, monkeypatch, onnxruntime, openvino, wanted):
    monkeypatch.setattr(graphs, "question_ms", lambda *_: {"onnxruntime": onnxruntime, "openvino": openvino})
    monkeypatch.setattr(graphs.importlib.metadata, "version", lambda _: "1.0")
    made = graphs.for_the_faster(tmp_path / "nq", write_engines(tmp_path / "nq"))
    assert (made.engine, made.precision) == (wanted, "float32") and Manifest.load(tmp_path / "nq") == made
    assert made.provenance["chosen_engine"]["question_ms"] == {"onnxruntime": onnxruntime, "openvino": openvino}


@WITHOUT_OPENVINO
def test_both_engines_are_timed_on_the_exported_graphs(engines, monkeypatch):
    _, directory = engines["released_fid"]
    for cores in (1, 2, 8):
        monkeypatch.setattr(graphs.os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        times = graphs.question_ms(directory, Manifest.load(directory), graphs.RUNS)
        assert {*times} == {"onnxruntime", "openvino"} and min(times.values()) > 0


@pytest.mark.parametrize("bf16_ms", [50.0, 200.0])
def test_bf16_that_is_slower_than_fp32_here_is_warned_of(tmp_path, monkeypatch, capsys, bf16_ms):
    monkeypatch.setattr(graphs, "question_ms", lambda directory, manifest, ways: dict(zip(ways, (100.0, bf16_ms), strict=True)))
    monkeypatch.setattr(graphs.importlib.metadata, "version", lambda _: "1.0")
    made = graphs.for_openvino(tmp_path / "nq", write_engines(tmp_path / "nq"), "bfloat16")
    assert made.precision == "bfloat16" and made.provenance["precision_ms"] == {"float32": 100.0, "bfloat16": bf16_ms}
    assert ("bf16 is slower than fp32" in capsys.readouterr().err) == (bf16_ms > 100)


@WITHOUT_OPENVINO
@WITHOUT_BF16
def test_a_reader_for_openvino_is_onnxruntimes_graphs_under_another_manifest(tmp_path):
    checkpoint = str(readers.ROOT / "checkpoints" / "fid")
    plain = build_reader(checkpoint, tmp_path / "plain", "onnxruntime", Limits())
    made = build_reader(checkpoint, tmp_path / "made", "openvino", Limits(), precision="bfloat16")
    assert (made.engine, made.precision, made.on_gpu) == ("openvino", "bfloat16", False)
    assert made.files == plain.files and made.provenance["versions"]["openvino"]
    with InProcessReader(tmp_path / "plain") as fp32, InProcessReader(tmp_path / "made") as bf16:
        question = ("what is the capital of France?", ["name: Paris; the city lies on the Seine"], ["France: Capital"])
        wanted, found = fp32.answer(*question), bf16.answer(*question)
    assert found.tokens == wanted.tokens and found.log_probs != wanted.log_probs


def test_a_reader_for_openvino_says_what_installs_it(engines, monkeypatch):
    _, directory = engines["fid"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "serving.engines.openvino", raising=False)
    manifest = dataclasses.replace(Manifest.load(directory), engine="openvino")
    with pytest.raises(EngineError, match=r"made for openvino, which cannot be loaded .*`make setup FOR=openvino`"):
        load_encoder(directory, manifest, Limits())
