"""Building GPU engines where there is no GPU: on a stand-in for the compiler, and refusals that leave nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest

from export.checkpoint.files import Checkpoint
from export.graphs.gpu import export_gpu_reader
from export.manifest_writer import write_manifest
from export.tensorrt import compiler, detect
from export.tensorrt.compiler import build_engines, graphs_of, tasks_of
from export.tensorrt.detect import BuildTarget, Gpu
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, ManifestError, sha256_of_file
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


class FakeCompiler:
    """Stands in for TensorRT: a plan is the name of its graph."""

    compiled: ClassVar[list[str]] = []
    builder_options: ClassVar[dict[str, str]] = {"profiling_verbosity": "detailed"}
    log: ClassVar[list[str]] = []

    def __init__(self, precision: str, timing_cache: Path | None = None):
        self.options = self.builder_options

    def compile(self, path: Path, profiles: object) -> bytes:
        self.compiled.append(path.stem)
        return path.stem.encode()

    def save_timings(self) -> None:
        pass


H100 = BuildTarget(Gpu("NVIDIA H100", "9.0", "13.0"), "10.1.0")


@pytest.fixture
def compiled_names(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Builds on a fake GPU and returns the names of the engines that were compiled, not taken from the cache."""
    monkeypatch.setattr(compiler, "Compiler", FakeCompiler)

    def build(target: BuildTarget = H100, limits: Limits | None = None, options: dict[str, str] | None = None) -> list[str]:
        monkeypatch.setattr(compiler, "build_target", lambda: target)
        monkeypatch.setattr(FakeCompiler, "builder_options", options or {"profiling_verbosity": "detailed"})
        monkeypatch.setattr(FakeCompiler, "compiled", [])
        monkeypatch.setattr(FakeCompiler, "log", [])
        directory = tmp_path / "engines"
        built = build_engines(graphs, directory, limits or Limits(), tmp_path / "cache" / "timings", log=FakeCompiler.log.append)
        built.verify(directory, tuple(built.files))
        assert built.build is not None and (built.build.gpu, built.build.version) == (target.gpu.name, target.tensorrt)
        for task in tasks_of(built, Limits()):
            assert (directory / f"{task.name}.plan").is_file()
        return list(FakeCompiler.compiled)

    return build


def test_only_what_has_changed_is_built_again(compiled_names, graphs: Path, tmp_path: Path) -> None:
    names = set(graphs_of(Manifest.load(graphs)))
    first = compiled_names()
    assert {"cross_kv", "encoder.wo", "decoder.wo"} <= set(first) <= names
    assert "decoder.cross_o" not in first  # the same GEMM as decoder.o
    assert compiled_names() == []
    assert compiled_names(limits=Limits(slots=3)) == [name for name in first if name.startswith("decoder.")]
    assert (tmp_path / "engines" / "encoder.wo.plan").read_bytes() == b"encoder.wo"


def test_the_log_names_the_gpu_every_engine_its_time_and_its_size(compiled_names, graphs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(FakeCompiler, "compile", lambda self, path, profiles: b"x" * 2_540_000)
    compiled_names()
    head, *lines = FakeCompiler.log
    names = list(graphs_of(Manifest.load(graphs)))
    assert head == f"{graphs}: {len(names)} engines with TensorRT 10.1.0 for NVIDIA H100"
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert re.fullmatch(rf"  {name}\.plan: \d+\.\d s, 2\.5 MB", line)
    files = {path.name for path in (tmp_path / "engines").iterdir()}
    assert not [file for file in files if ".onnx" in file] and "encoder.00.o.npy" in files


@pytest.mark.parametrize(
    "changed",
    [
        {"target": BuildTarget(Gpu("NVIDIA H200", "9.0", "13.0"), "10.1.0")},
        {"target": BuildTarget(Gpu("NVIDIA H100", "8.9", "13.0"), "10.1.0")},
        {"target": BuildTarget(Gpu("NVIDIA H100", "9.0", "12.8"), "10.1.0")},
        {"target": BuildTarget(Gpu("NVIDIA H100", "9.0", "13.0"), "10.2.0")},
        {"options": {"profiling_verbosity": "none"}},
    ],
    ids=["gpu", "compute capability", "driver", "tensorrt", "builder options"],
)
def test_a_cached_plan_is_not_used_elsewhere_or_with_other_options(compiled_names, changed) -> None:
    first = compiled_names()
    assert compiled_names(**changed) == first
    assert compiled_names(**changed) == []


def test_a_cached_plan_is_not_used_for_other_weights_above_2_gb(compiled_names, graphs: Path) -> None:
    """Such weights are in a .data file, and the graph's own file does not change with them."""

    def change_weights(content: bytes) -> None:
        (graphs / "cross_kv.onnx.data").write_bytes(content)
        manifest = Manifest.load(graphs)
        manifest.files["cross_kv.onnx.data"] = sha256_of_file(graphs / "cross_kv.onnx.data")
        (graphs / "manifest.json").write_text(manifest.to_json())

    change_weights(b"some")
    compiled_names()
    change_weights(b"other")
    assert compiled_names() == ["cross_kv"]


def test_a_damaged_cached_plan_is_built_again(compiled_names, tmp_path: Path) -> None:
    first = compiled_names()
    for plan in (tmp_path / "cache" / "plans").glob("*.plan"):
        plan.write_bytes(b"damaged")
    assert compiled_names() == first


class FakeTimings:
    """A TensorRT timing cache as text: one line per kernel."""

    def __init__(self, lines: bytes):
        self.lines = set(lines.split())

    def combine(self, other: FakeTimings, ignore_mismatch: bool) -> bool:
        self.lines |= other.lines
        return True

    def serialize(self) -> bytes:
        return b" ".join(sorted(self.lines))


def fake_tensorrt() -> types.SimpleNamespace:
    config = types.SimpleNamespace(create_timing_cache=FakeTimings)
    builder = types.SimpleNamespace(create_builder_config=lambda: config)
    return types.SimpleNamespace(
        __name__="tensorrt", __version__="10.1.0", Builder=lambda _: builder, ProfilingVerbosity=types.SimpleNamespace(DETAILED=2)
    )


def test_timings_of_processes_that_save_at_the_same_time_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_tensorrt", fake_tensorrt)
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", types.SimpleNamespace(get_trt_logger=lambda: None))
    cache = tmp_path / "timings"
    cache.write_bytes(b"before")
    compilers = [compiler.Compiler("float16", cache) for _ in range(8)]
    for i, one in enumerate(compilers):
        one._timings = f"kernel{i}".encode()
    threads = [threading.Thread(target=one.save_timings) for one in compilers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(cache.read_bytes().split()) == {b"before", *(f"kernel{i}".encode() for i in range(8))}


def test_timings_of_another_gpu_or_another_tensorrt_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", types.SimpleNamespace(get_trt_logger=lambda: None))
    trt = fake_tensorrt()
    assert compiler.merged_timings(trt, b"old", b"new") == b"new old"
    monkeypatch.setattr(FakeTimings, "combine", lambda self, other, ignore_mismatch: ignore_mismatch)
    assert compiler.merged_timings(trt, b"old", b"new") == b"new"
    trt.Builder(None).create_builder_config().create_timing_cache = lambda content: None if content == b"old" else FakeTimings(content)
    assert compiler.merged_timings(trt, b"old", b"new") == b"new"


class Layer:
    """A layer of a TensorRT network; `precision` and `types` are what it was pinned to."""

    def __init__(self, name: str, kind: str):
        self.name, self.type, self.num_outputs = name, kind, 1
        self.precision: str | None = None
        self.types: dict[int, str] = {}

    def set_output_type(self, index: int, dtype: str) -> None:
        self.types[index] = dtype


def test_tensorrt_8_computes_in_the_types_of_the_graph_and_shares_no_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no types from a graph by itself: norms in half precision would overflow."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["product"], name="gemm"),
        onnx.helper.make_node("Cast", ["product"], ["wide"], name="cast", to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["wide", "wide"], ["y"], name="square"),
    ]
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, kind, [2, 2]) for name, kind in (("x", half), ("w", half), ("y", full))]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", values[:2], values[2:])), str(tmp_path / "graph.onnx"))
    kinds = ("ELEMENTWISE", "REDUCE", "UNARY", "MATRIX_MULTIPLY", "SOFTMAX", "ACTIVATION")
    network = [Layer("gemm", "MATRIX_MULTIPLY"), Layer("cast", "CAST"), Layer("square", "ELEMENTWISE"), Layer("of tensorrt", "ELEMENTWISE")]
    trt = types.SimpleNamespace(
        __name__="tensorrt",
        __version__="8.6.1",
        float16="half",
        float32="float",
        ProfilingVerbosity=types.SimpleNamespace(DETAILED=2),
        TacticSource=types.SimpleNamespace(EDGE_MASK_CONVOLUTIONS=1, JIT_CONVOLUTIONS=2),
        PreviewFeature=types.SimpleNamespace(PROFILE_SHARING_0806=3),
        LayerType=types.SimpleNamespace(**{kind: kind for kind in kinds}),
    )
    asked: dict[str, object] = {}

    def network_of(path: str, **options: object):
        asked.update(path=path, network_options=options)
        return "builder", network, "parser"

    polygraphy = types.SimpleNamespace(
        CreateConfig=lambda **options: asked.update(options) or (lambda builder, network: types.SimpleNamespace()),
        Profile=lambda: None,
        engine_bytes_from_network=lambda network, config: b"plan",
        network_from_onnx_path=network_of,
    )
    monkeypatch.setattr(compiler, "_tensorrt", lambda: trt)
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", polygraphy)
    (tmp_path / "timings").write_bytes(b"of 8.6, which cannot read them")
    one = compiler.Compiler("float16", tmp_path / "timings")
    assert one.compile(tmp_path / "graph.onnx", []) == b"plan"
    assert {layer.name: (layer.precision, layer.types) for layer in network} == {
        "gemm": ("half", {0: "half"}),
        "cast": (None, {}),
        "square": ("float", {0: "float"}),
        "of tensorrt": (None, {}),
    }
    assert asked["network_options"] == {}  # 8.6 has no strong types
    assert (asked["fp16"], asked["precision_constraints"]) == (True, "obey")
    one.save_timings()
    assert (tmp_path / "timings").read_bytes() == b"of 8.6, which cannot read them"
    with pytest.raises(EngineError, match=r"precision bfloat16 needs TensorRT 10 or later, here is 8\.6\.1; export float16"):
        compiler.Compiler("bfloat16")


def test_tensorrt_10_takes_the_types_of_the_graph_and_one_build_s_timings_serve_the_next(tmp_path: Path, monkeypatch) -> None:
    class Config:
        def create_timing_cache(self, content: bytes) -> FakeTimings:
            return FakeTimings(content)

        def set_timing_cache(self, timings: FakeTimings, ignore_mismatch: bool) -> None:
            self.timings = timings

    def engine_bytes(network: tuple[str, object, str], config: Config) -> bytes:
        seen.append((network[1], sorted(config.timings.lines)))
        config.timings.lines.add(b"kernel%d" % len(seen))
        return b"plan"

    seen: list[object] = []
    polygraphy = types.SimpleNamespace(
        CreateConfig=lambda **options: lambda builder, network: Config(),
        Profile=lambda: None,
        engine_bytes_from_network=engine_bytes,
        network_from_onnx_path=lambda path, strongly_typed: ("builder", strongly_typed, "parser"),
    )
    monkeypatch.setattr(compiler, "_tensorrt", fake_tensorrt)
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", polygraphy)
    (tmp_path / "timings").write_bytes(b"before")
    one = compiler.Compiler("float16", tmp_path / "timings")
    assert [one.compile(tmp_path / "graph.onnx", []) for _ in range(2)] == [b"plan"] * 2
    assert seen == [(True, [b"before"]), (True, [b"before", b"kernel1"])]
    compiler.Compiler("float16", None).save_timings()
    assert (tmp_path / "timings").read_bytes() == b"before"


@pytest.mark.parametrize(("version", "refused"), [("8.6.0", True), ("9.3.0", True), ("10.0.0", False), ("11.4.0", False)])
def test_bfloat16_needs_a_tensorrt_that_takes_types_from_the_graph(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_tensorrt()
    trt.__version__ = version
    monkeypatch.setattr(compiler, "_tensorrt", lambda: trt)
    with pytest.raises(EngineError, match=version) if refused else contextlib.nullcontext():
        compiler.Compiler("bfloat16")


def test_processes_that_build_end_with_the_build_and_leave_ctrl_c_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_compile_shard", signal.getsignal)
    shards: Any = [signal.SIGINT] * 2
    assert list(compiler._in_processes(shards)) == [signal.SIG_IGN] * 2
    monkeypatch.setattr(compiler, "_compile_shard", os._exit)
    shards = [3, 3]
    with pytest.raises(EngineError, match=r"a process that builds engines died, .*; build with fewer --jobs"):
        list(compiler._in_processes(shards))
    started_s = time.monotonic()
    monkeypatch.setattr(compiler, "_compile_shard", time.sleep)
    shards = [600, -1]
    with pytest.raises(ValueError, match="non-negative"):  # of the one; the other would build for ten minutes
        list(compiler._in_processes(shards))
    assert time.monotonic() - started_s < 300 and not multiprocessing.active_children()


def test_a_failed_write_leaves_the_former_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_tensorrt", fake_tensorrt)
    cache = tmp_path / "timings"
    one = compiler.Compiler("float16", cache)
    one._timings = b"new"
    cache.write_bytes(b"")

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        one.save_timings()
    assert cache.read_bytes() == b""


def test_types_of_the_graph_hold_from_tensorrt_10_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [compiler.is_strongly_typed(version) for version in ("8.6.0", "10.0.1", "11.4.0.106", "12.0.0")] == [False, True, True, True]
    for version in ("8.5.3", "9.3.0"):
        with pytest.raises(EngineError, match=f"TensorRT: wanted 8.6, 10, 11, got {version}; see docs/gpu.md"):
            compiler.is_strongly_typed(version)


def test_a_failed_build_leaves_nothing(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "cuda_gpu", lambda: None)
    with pytest.raises(EngineError, match="TensorRT engines cannot be built here"):
        build_engines(graphs, tmp_path / "engines", Limits(), tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


def test_fp8_keys_and_values_are_refused_for_a_gpu_without_fp8(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(dataclasses.replace(Manifest.load(graphs), cross_kv_precision="float8"), graphs)
    for capability in ("8.0", "8.6"):
        monkeypatch.setattr(compiler, "build_target", lambda of=capability: BuildTarget(Gpu("A100", of, "13.0"), "10.1.0"))
        with pytest.raises(EngineError, match=rf"capability 8\.9 or later, got {capability}; .*--cross-kv-precision float16"):
            build_engines(graphs, tmp_path / "engines", Limits(), tmp_path / "timings")
    assert not (tmp_path / "engines").exists()


def test_damaged_graphs_are_not_built(graphs: Path, tmp_path: Path) -> None:
    (graphs / "encoder.00.o.npy").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"encoder\.00\.o\.npy: SHA-256"):
        build_engines(graphs, tmp_path / "engines", Limits(), tmp_path / "cache")


def test_gpu_engines_are_refused_where_cupy_is_missing(no_cupy: None, graphs: Path) -> None:
    for load in (load_encoder, load_decoder):
        with pytest.raises(EngineError, match="need CuPy, which is not installed"):
            load(graphs, Manifest.load(graphs), Limits())


def test_an_engine_that_nobody_knows_is_refused(graphs: Path) -> None:
    manifest = dataclasses.replace(Manifest.load(graphs), engine="ncnn")
    for load in (load_encoder, load_decoder):
        with pytest.raises(ManifestError, match="wanted one of onnxruntime, openvino, onnxruntime-gpu, tensorrt, got 'ncnn'"):
            load(graphs, manifest, Limits())


def test_an_altered_manifest_is_refused(graphs: Path) -> None:
    path = graphs / "manifest.json"
    fields = json.loads(path.read_text())
    fields["provenance"]["source"] = "another"
    path.write_text(json.dumps(fields))
    with pytest.raises(ManifestError, match="it was altered"):
        Manifest.load(graphs)
