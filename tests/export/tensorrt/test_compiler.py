"""Building and loading GPU engines where there is no GPU: refused in words, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from export.checkpoint.files import Checkpoint
from export.graphs.gpu import export_gpu_reader
from export.tensorrt.compiler import build_engines, default_backend, describe_gpu, graphs_of, tasks_of
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, ManifestError
from serving.engines.load import load_decoder, load_encoder
from tests.conftest import FIDO, random_reader, wide

WIDE = wide(FIDO)


@pytest.fixture
def graphs(tmp_path: Path, tokenizer_json: str) -> Path:
    export_gpu_reader(Checkpoint(random_reader(WIDE), tokenizer_json, "test", "own"), tmp_path / "graphs")
    return tmp_path / "graphs"


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)


def test_there_is_a_task_for_every_graph_with_the_limits_in_its_profile(graphs: Path) -> None:
    manifest = Manifest.load(graphs)
    tasks = tasks_of(manifest, Limits(slots=5, max_passages=7))
    assert sorted(f"{task.name}.onnx" for task in tasks) == sorted(file for file in manifest.files if file.endswith(".onnx"))
    profiles = {task.name: task.profiles[0] for task in tasks}
    assert profiles["encoder.wo"]["x"][2] == (7 * manifest.prompt.passage_length, 40)
    assert profiles["decoder.qkv"]["x"][2] == (5, 32)


def test_a_whole_encoder_is_one_task(tmp_path: Path, tokenizer_json: str) -> None:
    checkpoint = Checkpoint(random_reader(WIDE), tokenizer_json, "test", "own")
    manifest = export_gpu_reader(checkpoint, tmp_path / "graphs", whole_encoder=True)
    assert tasks_of(manifest, Limits(encoder_batch=60))[0].profiles[0]["input_ids"][2] == (60, manifest.prompt.passage_length)


class CountingCompiler:
    """In place of TensorRT: an engine is the name of its graph."""

    compiled: ClassVar[list[str]] = []

    def __init__(self, precision: str, timing_cache: Path | None = None):
        pass

    def compile(self, path: Path, profiles: object) -> bytes:
        self.compiled.append(path.stem)
        return path.stem.encode()

    def save_timings(self) -> None:
        pass


def test_only_what_has_changed_is_built_again(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.tensorrt.compiler.Compiler", CountingCompiler)
    monkeypatch.setattr("export.tensorrt.compiler.describe_gpu", lambda: ("GPU", "9.0", "8.6.0"))
    names = list(graphs_of(Manifest.load(graphs)))
    rounds = {}
    for what, limits in (("all", Limits()), ("nothing", Limits()), ("the decoder's", Limits(slots=3))):
        CountingCompiler.compiled = []
        built = build_engines(graphs, tmp_path / "engines", limits, tmp_path / "cache" / "timings", log=lambda _: None)
        built.verify(tmp_path / "engines", tuple(built.files))
        assert built.build is not None and built.build.gpu == "GPU" and len(built.build.seconds) == len(names)
        rounds[what] = list(CountingCompiler.compiled)
    assert rounds["nothing"] == [] and {"cross_kv", "encoder.wo", "decoder.wo"} <= set(rounds["all"]) <= set(names)
    assert "decoder.cross_o" not in rounds["all"]  # the same gemm as decoder.o
    assert rounds["the decoder's"] == [name for name in rounds["all"] if name.startswith("decoder.")]
    assert (tmp_path / "engines" / "encoder.wo.plan").read_bytes() == b"encoder.wo"


def test_without_a_gpu_the_cpu_is_what_fits(no_cupy: None) -> None:
    assert default_backend() == "onnxruntime"
    with pytest.raises(EngineError, match=r"TensorRT engines cannot be built here: .*requirements-gpu.txt"):
        describe_gpu()


def test_a_failed_build_leaves_nothing(no_cupy: None, graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        build_engines(graphs, tmp_path / "engines", Limits(), tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


def test_damaged_graphs_are_not_built(graphs: Path, tmp_path: Path) -> None:
    (graphs / "encoder.00.o.npy").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"encoder\.00\.o\.npy: SHA-256"):
        build_engines(graphs, tmp_path / "engines", Limits(), tmp_path / "cache")


def test_gpu_engines_are_refused_where_cupy_is_missing(no_cupy: None, graphs: Path) -> None:
    for load in (load_encoder, load_decoder):
        with pytest.raises(EngineError, match="need CuPy, which is not installed"):
            load(graphs, Manifest.load(graphs), Limits())


def test_an_engine_that_nobody_knows_is_refused(graphs: Path) -> None:
    manifest = dataclasses.replace(Manifest.load(graphs), engine="openvino")
    for load in (load_encoder, load_decoder):
        with pytest.raises(ManifestError, match="wanted one of onnxruntime, onnxruntime-gpu, tensorrt, got 'openvino'"):
            load(graphs, manifest, Limits())


def test_an_altered_manifest_is_refused(graphs: Path) -> None:
    path = graphs / "manifest.json"
    fields = json.loads(path.read_text())
    fields["provenance"]["source"] = "another"
    path.write_text(json.dumps(fields))
    with pytest.raises(ManifestError, match="it was altered"):
        Manifest.load(graphs)
