"""Which engine fits a machine; nothing that is missing or broken may end in a traceback."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from export import command_line
from export.tensorrt import detect
from export.tensorrt.detect import GPU_LIMITS, Gpu, build_target, cuda_gpu, default_backend, gpu_limits, gpu_memory_bytes
from export.tensorrt.plan_cache import PlanCache, fingerprint
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError

H100 = Gpu("NVIDIA H100", "9.0", "13.0")
ONNXRUNTIME = types.SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
ONNXRUNTIME_CPU = types.SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
TENSORRT = types.SimpleNamespace(__version__="10.1.0")
MISSING_LIBRARY = OSError("libcudnn.so.8: cannot open shared object file")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with a GPU, and packages that are present, missing (None) or broken (an exception)."""

    def make(gpu: Gpu | None, **packages: object) -> None:
        def import_module(name: str) -> object:
            found = packages.get(name)
            if found is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(detect, "cuda_gpu", lambda: gpu)
        monkeypatch.setattr(detect, "importlib", types.SimpleNamespace(import_module=import_module))

    return make


@pytest.mark.parametrize(
    ("gpu", "packages", "wanted"),
    [
        (None, {"cupy": object(), "tensorrt": TENSORRT, "onnxruntime": ONNXRUNTIME}, "onnxruntime"),
        (H100, {"cupy": object(), "tensorrt": TENSORRT, "onnxruntime": ONNXRUNTIME}, "tensorrt"),
        (H100, {"cupy": object(), "onnxruntime": ONNXRUNTIME}, "onnxruntime-gpu"),
        (H100, {"cupy": object(), "onnxruntime": ONNXRUNTIME_CPU}, "onnxruntime"),
        (H100, {"tensorrt": TENSORRT, "onnxruntime": ONNXRUNTIME}, "onnxruntime"),
        (H100, {"cupy": object(), "tensorrt": MISSING_LIBRARY, "onnxruntime": ONNXRUNTIME}, "onnxruntime-gpu"),
        (H100, {"cupy": RuntimeError("CuPy failed to load libnvrtc.so"), "tensorrt": TENSORRT}, "onnxruntime"),
    ],
)
def test_the_fastest_engine_that_can_be_loaded_is_chosen(machine, gpu, packages, wanted, capsys):
    machine(gpu, **packages)
    assert default_backend() == wanted
    broken = [name for name, package in packages.items() if isinstance(package, Exception)]
    assert capsys.readouterr().err.count("is installed but cannot be loaded") == (len(broken) if gpu else 0)


@pytest.mark.parametrize(
    ("gpu", "packages", "message"),
    [
        (None, {"tensorrt": TENSORRT}, "wanted an NVIDIA GPU and its driver, found none"),
        (H100, {}, r"No module named 'tensorrt'; see requirements-gpu.txt"),
        (H100, {"tensorrt": MISSING_LIBRARY}, r"libcudnn.so.8.*; see requirements-gpu.txt"),
    ],
)
def test_a_machine_that_cannot_build_says_why(machine, gpu, packages, message):
    machine(gpu, **packages)
    with pytest.raises(EngineError, match=f"TensorRT engines cannot be built here: .*{message}"):
        build_target()


FAKE_DRIVER = """
int cuInit(unsigned flags) { return RESULT; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGet(int *device, int number) { *device = 7; return 0; }
int cuDeviceGetName(char *name, int size, int device) { const char *s = "NVIDIA Test"; do *name++ = *s; while (*s++); return device != 7; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 6; return device != 7; }
"""


@pytest.mark.parametrize(("result", "wanted"), [(0, Gpu("NVIDIA Test", "8.6", "12.8")), (100, None)])
def test_the_driver_names_the_gpu(result: int, wanted: Gpu | None, tmp_path: Path):
    (tmp_path / "driver.c").write_text(FAKE_DRIVER.replace("RESULT", str(result)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "driver.so", tmp_path / "driver.c"], check=True)
    assert cuda_gpu(str(tmp_path / "driver.so")) == wanted


def test_no_driver_is_no_gpu():
    assert cuda_gpu("libno-such-driver.so") is None


def test_detect_survives_a_package_with_a_missing_library(tmp_path: Path):
    """The whole command, with a GPU driver and a TensorRT whose import fails as without cuDNN."""
    (tmp_path / "driver.c").write_text(FAKE_DRIVER.replace("RESULT", "0"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    (tmp_path / "cupy.py").write_text("")
    (tmp_path / "tensorrt.py").write_text("import ctypes\nctypes.CDLL('libcudnn-is-missing.so.8')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "export", "detect"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "onnxruntime\n")
    assert "tensorrt is installed but cannot be loaded: libcudnn-is-missing.so.8" in done.stderr


def test_importing_the_module_imports_no_package():
    assert importlib.util.find_spec("numpy") is not None
    code = "import sys, export.tensorrt.detect; sys.exit(bool({'numpy', 'cupy', 'tensorrt', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The plan cache: verified, bounded, and told apart by everything that a plan depends on.


def test_a_stored_plan_comes_back(tmp_path: Path):
    cache = PlanCache(tmp_path / "plans")
    assert not cache.fetch("key", tmp_path / "a.plan")
    cache.store("key", b"plan")
    assert cache.fetch("key", tmp_path / "a.plan") and (tmp_path / "a.plan").read_bytes() == b"plan"


def test_a_damaged_plan_is_dropped_and_not_used(tmp_path: Path):
    cache = PlanCache(tmp_path / "plans")
    cache.store("key", b"plan")
    (tmp_path / "plans" / "key.plan").write_bytes(b"plam")
    assert not cache.fetch("key", tmp_path / "a.plan")
    assert not (tmp_path / "a.plan").exists() and not list((tmp_path / "plans").glob("key*"))


def test_a_plan_without_its_hash_is_not_used(tmp_path: Path):
    """As a crash between the two writes leaves it."""
    cache = PlanCache(tmp_path / "plans")
    cache.store("key", b"plan")
    (tmp_path / "plans" / "key.sha256").unlink()
    assert not cache.fetch("key", tmp_path / "a.plan")


def test_the_plans_used_least_recently_are_evicted(tmp_path: Path):
    cache = PlanCache(tmp_path / "plans", max_bytes=30)
    for age, key in ((3, "a"), (2, "b"), (1, "c")):
        cache.store(key, b"x" * 10)
        os.utime(tmp_path / "plans" / f"{key}.plan", ns=(10**18 - age, 10**18 - age))
    assert cache.fetch("a", tmp_path / "a.plan")  # used now, so that b is the oldest
    cache.store("d", b"x" * 10)
    assert {path.stem for path in (tmp_path / "plans").glob("*.plan")} == {"a", "c", "d"}
    assert {path.stem for path in (tmp_path / "plans").glob("*.sha256")} == {"a", "c", "d"}
    cache.store("large", b"x" * 100)
    assert {path.stem for path in (tmp_path / "plans").glob("*.plan")} == {"large"}


def test_fingerprints_depend_on_every_part_and_on_nothing_else():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint({"a": a, "b": b}) for a in (1, 2) for b in (None, "x")}) == 4


@pytest.mark.parametrize(
    ("cores", "chosen", "wanted"),
    [
        (16, None, {"slots": 32, "encoder_batch": 120, "encoder_instances": 2, "reader_instances": 3, "encode_threads": 16}),
        (8, None, {"slots": 32, "encoder_batch": 120, "encoder_instances": 2, "reader_instances": 2, "encode_threads": 8}),
        (4, None, {"slots": 32, "encoder_batch": 120, "encoder_instances": 1, "reader_instances": 1, "encode_threads": 8}),
        (16, 1, {"slots": 32, "encoder_batch": 120, "encoder_instances": 2, "reader_instances": 1, "encode_threads": 16}),
    ],
)
def test_limits_on_a_gpu_are_those_of_its_machine(monkeypatch, cores, chosen, wanted):
    monkeypatch.setattr(detect, "gpu_memory_bytes", lambda: 80_000_000_000)
    monkeypatch.setattr(detect.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert gpu_limits(chosen) == {**wanted, "kv_cache_bytes": 24_000_000_000 // wanted["reader_instances"]}
    assert set(GPU_LIMITS) == set(gpu_limits(chosen)) <= set(Limits.names())


def test_the_command_line_takes_a_gpus_limits_for_a_reader_that_it_builds_for_one(monkeypatch):
    monkeypatch.setattr(command_line, "gpu_limits", lambda instances: {"slots": 32, "reader_instances": instances or 3})

    def limits(*arguments: str) -> Limits:
        return command_line.limits(command_line.parser(None).parse_args(arguments))

    assert limits("readers", "fid=x") == Limits(slots=32, reader_instances=3)
    assert limits("readers", "fid=x", "--reader-instances", "2", "--engine", "tensorrt") == Limits(slots=32, reader_instances=2)
    assert limits("build", "x", "y", "--slots", "8") == Limits(slots=8, reader_instances=3)
    assert limits("readers", "fid=x", "--engine", "onnxruntime") == limits("repository", "x", "--reader", "fid") == Limits()


def test_a_machine_without_a_gpu_or_cupy_has_no_limits_of_its_own(monkeypatch):
    assert gpu_memory_bytes("libnone.so") is None
    monkeypatch.setattr(detect, "gpu_memory_bytes", lambda: None)
    assert gpu_limits() == {}
    monkeypatch.setattr(detect, "gpu_memory_bytes", lambda: 80_000_000_000)
    monkeypatch.setattr(detect.importlib.util, "find_spec", lambda name: None)
    assert gpu_limits() == {}
