"""TensorRTEngine on a stand-in for TensorRT 8.6, 10 and 11: profiles, contexts, addresses, scratch memory, refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.contract.limits import Limits, LimitsError
from serving.contract.manifest import EngineBuild, EngineError, Manifest, ManifestError, Prompt
from serving.contract.tensors import EngineSizes, GraphTensors, TensorSpec
from tests.serving.engines import fake_cupy, fake_tensorrt

NAME, FILE = "decoder.wi", "decoder.wi.plan"
TENSORS = GraphTensors(
    (TensorSpec("x", "float16", ("batch", 8)), TensorSpec("weight", "float16", (8, 16))), (TensorSpec("y", "float16", ("batch", 16)),)
)
# rows up to 4, and up to 12
PROFILES: list[dict[str, tuple[tuple[int, ...], ...]]] = [
    {"x": ((1, 8), (rows, 8), (rows, 8)), "weight": ((8, 16),) * 3} for rows in (4, 12)
]
SMALL, LARGE = 0, 1


@pytest.fixture(params=fake_tensorrt.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trt(version: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module(version))
    return sys.modules["tensorrt"]


@pytest.fixture
def manifest(tmp_path: Path, version: str) -> Manifest:
    build = EngineBuild("NVIDIA H200", "9.0", version, {FILE: PROFILES}, {})
    sizes = EngineSizes(8, 8, 1, (0,), 1, 1, 8, 97)
    empty = Manifest("fid", "tensorrt", "float16", sizes, Prompt("{question}", 8, True), 0, 1, 0, {}, "0" * 64, {}, build=build)
    return with_plan(empty, tmp_path, fake_tensorrt.plan(["x", "weight", "y"], 1000))


def with_plan(manifest: Manifest, directory: Path, plan: bytes) -> Manifest:
    (directory / FILE).write_bytes(plan)
    return dataclasses.replace(manifest, files={FILE: hashlib.sha256(plan).hexdigest()})


@pytest.fixture
def load(runtime: Callable[[str], Any], trt: Any, tmp_path: Path) -> Callable[..., Any]:
    def load(manifest: Manifest, scratch: Any = None) -> Any:
        scratch = scratch or runtime("engine").Scratch()
        return runtime("tensorrt").TensorRTEngine(tmp_path, manifest, NAME, TENSORS, scratch)

    return load


def arrays(rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    zeros = {
        name: fake_cupy.array(np.zeros(shape, np.float16)) for name, shape in (("x", (rows, 8)), ("weight", (8, 16)), ("y", (rows, 16)))
    }
    return {"x": zeros["x"], "weight": zeros["weight"]}, {"y": zeros["y"]}


def contexts_of(trt: Any) -> list[Any]:
    return list(trt.runtimes[-1].engines[-1].contexts)


@pytest.mark.parametrize(("rows", "profile"), [(1, SMALL), (4, SMALL), (5, LARGE), (12, LARGE)])
def test_a_call_runs_in_the_smallest_profile_on_its_arrays(rows: int, profile: int, load: Any, manifest: Manifest, trt: Any) -> None:
    inputs, outputs = arrays(rows)
    call = load(manifest).bind(inputs, outputs)
    (context,) = contexts_of(trt)
    assert context.profiles == [profile]
    assert context.shapes == {"x": (rows, 8), "weight": (8, 16)}
    assert context.addresses == {name: array.data.ptr for name, array in (inputs | outputs).items()}
    stream = fake_cupy.Context()
    stream.ptr = 77
    call.enqueue(stream)
    assert context.streams == [77]


def test_each_profile_and_context_number_has_one_context(load: Any, manifest: Manifest, trt: Any) -> None:
    engine = load(manifest)
    for rows, number in ((1, 0), (3, 0), (3, 8), (9, 8), (9, 8), (1, 0)):
        engine.bind(*arrays(rows), context=number)
    assert [context.profiles for context in contexts_of(trt)] == [[SMALL], [SMALL], [LARGE]]
    assert [context.shapes["x"][0] for context in contexts_of(trt)] == [1, 3, 9], "the last binding of each context holds"


def test_engines_share_the_scratch_memory_of_the_largest(
    load: Any, manifest: Manifest, tmp_path: Path, trt: Any, runtime: Any, version: str
) -> None:
    scratch = runtime("engine").Scratch()
    engines = []
    for memory in (1000, 3000, 0):
        engines.append(load(with_plan(manifest, tmp_path, fake_tensorrt.plan(["x", "weight", "y"], memory)), scratch))
    assert scratch.bytes == 3000
    for engine in engines:
        engine.bind(*arrays(1))
    contexts = [context for engine in trt.runtimes[0].engines for context in engine.contexts]
    assert {context.device_memory for context in contexts} == {scratch.address()} and scratch.address() != 0
    if not version.startswith("8"):
        assert {context.device_memory_size for context in contexts} == {3000}


def test_an_engine_without_activations_loads(load: Any, manifest: Manifest, tmp_path: Path) -> None:
    """TensorRT 11 has device_memory_size_v2 only, and 0 is a valid size."""
    load(with_plan(manifest, tmp_path, fake_tensorrt.plan(["x", "weight", "y"], 0))).bind(*arrays(1))


def test_all_engines_have_one_runtime_and_one_logger(load: Any, manifest: Manifest, trt: Any) -> None:
    for _ in range(3):
        load(manifest)
    assert len(trt.runtimes) == len(trt.loggers) == 1


@pytest.mark.parametrize(
    ("field", "said"),
    [("gpu", "GPU: built for another"), ("compute_capability", "compute cap"), ("version", "TensorRT: built for another")],
)
def test_an_engine_of_elsewhere_is_refused_before_it_is_loaded(field: str, said: str, load: Any, manifest: Manifest, trt: Any) -> None:
    assert manifest.build is not None
    elsewhere = dataclasses.replace(manifest, build=dataclasses.replace(manifest.build, **{field: "another"}))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=rf"{FILE}: {said}"):
        load(elsewhere)
    with pytest.raises(EngineError, match="does not say which GPU it was built for"):
        load(dataclasses.replace(manifest, build=None))
    assert not trt.runtimes


def test_a_corrupted_plan_never_reaches_tensorrt(load: Any, manifest: Manifest, tmp_path: Path, trt: Any) -> None:
    (tmp_path / FILE).write_bytes(fake_tensorrt.plan(["x", "weight", "y"], 1001))
    with pytest.raises(ManifestError, match=f"{FILE}: SHA-256"):
        load(manifest)
    assert not any(runtime.engines for runtime in trt.runtimes)


def test_a_plan_that_tensorrt_cannot_load_is_refused(load: Any, manifest: Manifest, tmp_path: Path, version: str) -> None:
    with pytest.raises(EngineError, match=f"{FILE}: TensorRT {version} cannot load it; `make export"):
        load(with_plan(manifest, tmp_path, b"of another format"))


def test_an_engine_with_other_tensors_is_refused(load: Any, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"wanted tensors \['x', 'weight', 'y'\], got \['x', 'y'\]"):
        load(with_plan(manifest, tmp_path, fake_tensorrt.plan(["x", "y"])))


@pytest.mark.parametrize(("name", "dtype", "said"), [("x", "FLOAT", "x: float32"), ("y", "BF16", "y: bfloat16"), ("y", "FP4", "another")])
def test_an_engine_whose_tensors_have_other_types_is_refused(name, dtype, said, load: Any, manifest: Manifest, tmp_path: Path) -> None:
    """TensorRT takes addresses: it would read fp16 bits as fp32."""
    with pytest.raises(EngineError, match=rf"{FILE}: wanted x: float16\[batch, 8\], .*, got .*{said}"):
        load(with_plan(manifest, tmp_path, fake_tensorrt.plan(["x", "weight", "y"], **{name: dtype})))


def test_shapes_beyond_all_profiles_are_refused(load: Any, manifest: Manifest) -> None:
    with pytest.raises(EngineError, match=r"no profile covers the shapes .*13, 8.*largest are .*12, 8"):
        load(manifest).bind(*arrays(13))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("set_optimization_profile_async", "TensorRT cannot set profile 0"),
        ("set_input_shape", r"x: TensorRT refuses the shape \[2, 8\]"),
        ("set_tensor_address", "x: TensorRT refuses the address 0x"),
        ("execute_async_v3", "TensorRT did not run it"),
    ],
)
def test_what_tensorrt_refuses_is_an_error(method: str, said: str, load: Any, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt.Context, method, lambda self, *arguments: False)
    with pytest.raises(EngineError, match=f"{FILE}: {said}"):
        load(manifest).bind(*arrays(2)).enqueue(fake_cupy.Context())


def test_limits_beyond_the_profiles_are_refused_at_load(trt: Any, runtime: Any, manifest: Manifest, tmp_path: Path) -> None:
    from serving.engines.load import gpu_loader

    scratch = runtime("engine").Scratch()
    gpu_loader(tmp_path, manifest, Limits(slots=12), 0)(NAME, TENSORS, scratch)
    with pytest.raises(LimitsError, match=rf"{FILE}: batch: wanted at most 12, .* allow 13; lower slots"):
        gpu_loader(tmp_path, manifest, Limits(slots=13), 0)(NAME, TENSORS, scratch)


def test_the_stand_in_for_version_11_has_nothing_that_the_real_one_lacks(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("tensorrt_rtx_bindings")  # TensorRT-RTX has the interface of TensorRT 11, and needs no GPU to import
    for ours, theirs in ((fake_tensorrt.Engine11, real.ICudaEngine), (fake_tensorrt.Context10, real.IExecutionContext)):
        assert {name for name in dir(ours) if not name.startswith("_")} <= set(dir(theirs))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module("11.4.0"))
    assert set(runtime("tensorrt").TYPES) <= set(real.DataType.__members__)
    assert hasattr(real.ExecutionContextAllocationStrategy, "USER_MANAGED") and hasattr(real.Logger, "WARNING")
    assert not hasattr(real.ICudaEngine, "device_memory_size")
    assert not hasattr(real.ICudaEngine, "create_execution_context_without_device_memory")
