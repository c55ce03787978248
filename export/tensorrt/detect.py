"""The GPU of this machine and the engine that runs here. Importing this module imports neither CuPy nor TensorRT."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.util
import os
import sys
from typing import Any

# Attributes of a device in CUDA's driver API.
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
NAME_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA's driver names it.

    Attributes:
        name: as "NVIDIA H100 80GB HBM3".
        compute_capability: as "9.0".
        driver: the newest CUDA version that the driver supports, as "13.0".
    """

    name: str
    compute_capability: str
    driver: str


def cuda_gpu(library: str = "libcuda.so.1") -> Gpu | None:
    """The first visible GPU, or None without a driver or a GPU. Takes milliseconds: it asks the driver and imports nothing."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    version, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDriverGetVersion(ctypes.byref(version))
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, NAME_BYTES, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", f"{version.value // 1000}.{version.value % 1000 // 10}")


def gpu_memory_bytes(library: str = "libcuda.so.1") -> int | None:
    """All memory of the first visible GPU, or None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return None if failed else memory.value


@dataclasses.dataclass(frozen=True)
class BuildTarget:
    """What TensorRT engines are built for and with; they run nowhere else."""

    gpu: Gpu
    tensorrt: str


def build_target() -> BuildTarget:
    """The GPU and the TensorRT of this machine.

    Raises:
        EngineError: if either is missing.
    """
    from serving.contract.manifest import EngineError  # imports NumPy

    gpu = cuda_gpu()
    if gpu is None:
        raise EngineError("TensorRT engines cannot be built here: wanted an NVIDIA GPU and its driver, found none")
    try:
        tensorrt = importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:  # OSError: one of its shared libraries is missing
        raise EngineError(f"TensorRT engines cannot be built here: {error}; see requirements-gpu.txt") from error
    return BuildTarget(gpu, tensorrt.__version__)


def default_backend() -> str:
    """The fastest engine that this machine can run: "tensorrt", "onnxruntime-gpu" or "onnxruntime".

    A package that is installed but cannot be loaded is named on standard error.
    """
    if cuda_gpu() is None or _loaded("cupy") is None:  # the runtime on a GPU is CuPy's
        return "onnxruntime"
    if _loaded("tensorrt") is not None:
        return "tensorrt"
    onnxruntime = _loaded("onnxruntime")
    if onnxruntime is not None and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return "onnxruntime-gpu"
    return "onnxruntime"


def _loaded(package: str) -> Any:
    """The imported package, or None where it is missing or broken."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:  # OSError: one of its shared libraries is missing
        if not (isinstance(error, ModuleNotFoundError) and error.name == package):
            print(f"note: {package} is installed but cannot be loaded: {error}", file=sys.stderr)
        return None


# What `gpu_limits` chooses, in words.
GPU_LIMITS = {
    "slots": "32",
    "encoder_batch": "120",
    "encoder_instances": "2 from 8 cores",
    "reader_instances": "2 from 8 cores, 3 from 12",
    "encode_threads": "16 from 12 cores",
    "kv_cache_bytes": "0.3 of the memory, divided among reader_instances",
}
# Of a GPU's memory, for one model's keys and values: a reader may be served unary and streaming, and FiD beside FiDO, whose share is small.
KV_SHARE = 0.3


def gpu_limits(reader_instances: int | None = None) -> dict[str, int]:
    """Limits of a reader on this machine's GPU, by name; empty where there is none, or no CuPy for the runtime on it.

    With 16 cores and an H100 the numbers of processes are those of the benchmark. There three reader processes answered more than two (380
    questions/s and 325, FiDO in FP8): their Python code runs in parallel.

    Args:
        reader_instances: if it was chosen; None for this machine's.
    """
    memory = gpu_memory_bytes()
    if memory is None or importlib.util.find_spec("cupy") is None:
        return {}
    cores = len(os.sched_getaffinity(0))
    instances = reader_instances or (3 if cores >= 12 else 2 if cores >= 8 else 1)
    return {
        "slots": 32,
        "encoder_batch": 120,
        "encoder_instances": 2 if cores >= 8 else 1,
        "reader_instances": instances,
        "encode_threads": 16 if cores >= 12 else 8,
        "kv_cache_bytes": int(memory * KV_SHARE / instances),
    }
