"""OnnxGpuEngine on a stand-in for ONNX Runtime with a CUDA provider: where it runs, what it binds, what it refuses."""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.contract.manifest import EngineError, Manifest, ManifestError, Prompt
from serving.contract.tensors import EngineSizes, GraphTensors
from tests.serving.engines import fake_cupy

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
FILE = "decoder.wi.onnx"


class Session:
    """Records its providers, bindings and runs."""

    def __init__(self, path: str, options: Any, providers: list[Any]):
        self.content, self.providers = Path(path).read_bytes(), providers
        self.runs: list[tuple[Any, Any]] = []
        if self.content == b"damaged":
            raise RuntimeError("no protobuf")

    def get_providers(self) -> list[str]:
        return [CPU] if self.content == b"no CUDA libraries" else [CUDA, CPU]

    def io_binding(self) -> Any:
        bound: dict[str, list[Any]] = {"inputs": [], "outputs": []}
        return types.SimpleNamespace(
            **bound,
            bind_input=lambda *arguments: bound["inputs"].append(arguments),
            bind_output=lambda *arguments: bound["outputs"].append(arguments),
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append((binding, options))


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("onnxruntime")
    module.InferenceSession, module.RunOptions, module.SessionOptions = Session, RunOptions, types.SimpleNamespace
    module.get_available_providers = lambda: [CUDA, CPU]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return module


@pytest.fixture
def load(runtime: Callable[[str], Any], ort: Any, tmp_path: Path) -> Callable[[bytes], Any]:
    def load(content: bytes, wanted: bytes | None = None) -> Any:
        (tmp_path / FILE).write_bytes(content)
        hashes = {FILE: hashlib.sha256(content if wanted is None else wanted).hexdigest()}
        sizes = EngineSizes(8, 8, 1, (0,), 1, 1, 8, 97)
        manifest = Manifest("fid", "onnxruntime-gpu", "float16", sizes, Prompt("{question}", 8, True), 0, 1, 0, hashes, "0" * 64, {})
        engine = runtime("onnxruntime").OnnxGpuEngine(tmp_path, manifest, "decoder.wi", GraphTensors((), ()), 3)
        assert not engine.capturable and engine.weight_bytes == len(content)
        return engine

    return load


def test_it_runs_on_its_device_and_the_current_stream_without_waiting(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = fake_cupy.Context()
    stream.ptr = 99
    monkeypatch.setattr(sys.modules["cupy"].cuda, "get_current_stream", lambda: stream)
    engine = load(b"graph")
    session = engine._session
    assert session.content == b"graph"
    assert session.providers == [(CUDA, {"device_id": 3, "user_compute_stream": "99"})], "no provider to fall back to"
    x, y = (fake_cupy.array(np.zeros((rows, 8), np.float16)) for rows in (2, 5))
    first, second = engine.bind({"x": x}, {"y": y}), engine.bind({"x": y}, {"y": x}, context=1)
    second.enqueue(stream)
    first.enqueue(stream)
    (_, options), (binding, _) = session.runs
    assert binding.inputs == [("x", "cuda", 3, np.float16, (2, 8), x.data.ptr)]
    assert binding.outputs == [("y", "cuda", 3, np.float16, (5, 8), y.data.ptr)]
    assert options.entries == {"disable_synchronize_execution_providers": "1"}


def test_an_altered_graph_is_refused(load: Any) -> None:
    with pytest.raises(ManifestError, match=f"{FILE}: SHA-256"):
        load(b"graph", wanted=b"another")


def test_a_graph_that_changes_during_the_load_is_refused(load: Any, ort: Any, tmp_path: Path) -> None:
    def session(path: str, *arguments: Any, **options: Any) -> Session:
        Path(path).write_bytes(b"another graph")
        return Session(path, *arguments, **options)

    ort.InferenceSession = session
    with pytest.raises(ManifestError, match=f"{FILE}: replaced or written to while it was loaded"):
        load(b"graph")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"damaged", "ONNX Runtime cannot load it: no protobuf"), (b"no CUDA libraries", "ONNX Runtime fell back to the")],
)
def test_what_cannot_run_on_the_gpu_is_refused(content: bytes, said: str, load: Any) -> None:
    with pytest.raises(EngineError, match=f"{FILE}: {said}"):
        load(content)


def test_an_onnxruntime_without_cuda_is_refused(load: Any, ort: Any) -> None:
    ort.get_available_providers = lambda: [CPU]
    with pytest.raises(EngineError, match=f"{FILE}: this onnxruntime has no {CUDA}; install onnxruntime-gpu"):
        load(b"graph")
