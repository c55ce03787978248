"""The CUDA devices of this process: which it uses, what engines must be built for, and whether an error has made one unusable.

Can be imported without CuPy and TensorRT: the functions that need them import them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from serving.contract.manifest import BuildTarget, EngineError

# After these errors every CUDA call of the process fails; no call clears them. cudaError_t and CUresult have the same numbers here.
STICKY_STATUSES = frozenset(
    (
        214,  # uncorrectable ECC error
        220,  # uncorrectable NVLink error
        700,  # illegal address
        702,  # launch timeout
        710,  # device-side assert
        714,  # hardware stack error
        715,  # illegal instruction
        716,  # misaligned address
        717,  # invalid address space
        718,  # invalid program counter
        719,  # launch failure
    )
)

_used_devices: set[int] = set()


def use_device(device: int) -> None:
    """Make `device` this thread's current one, and remember that this process uses it.

    Raises:
        EngineError: if CuPy is not installed or the device cannot be used.
    """
    try:
        import cupy as cp
    except ImportError as error:
        raise EngineError(f"engines for the GPU need CuPy, which is not installed ({error}); see requirements-gpu.txt") from error
    try:
        cp.cuda.Device(device).use()
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise EngineError(f"engines for the GPU, but CUDA device {device} cannot be used ({error})") from error
    _used_devices.add(device)


def build_target() -> BuildTarget:
    """The GPU that is this thread's current device, and the TensorRT of this process: what an engine must be built for to run here.

    Raises:
        EngineError: if CuPy, TensorRT or the GPU is missing.
    """
    try:
        import cupy as cp
        import tensorrt
    except ImportError as error:
        raise EngineError(f"TensorRT engines need CuPy and TensorRT: {error}; see requirements-gpu.txt") from error
    try:
        properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise EngineError(f"TensorRT engines need a usable GPU: {error}") from error
    return BuildTarget(properties["name"].decode(), f"{properties['major']}.{properties['minor']}", tensorrt.__version__)


def is_sticky(error: BaseException) -> bool:
    """Whether `error`, or an error that led to it, has made a device of this process unusable.

    TensorRT and ONNX Runtime report CUDA errors as errors of their own. Therefore this also asks every device in use for its free memory:
    the call does not wait for running work, and it fails once a sticky error has occurred.
    """
    if (cp := sys.modules.get("cupy")) is None:
        return False
    cuda_errors = (cp.cuda.runtime.CUDARuntimeError, cp.cuda.driver.CUDADriverError)
    if any(isinstance(cause, cuda_errors) and cause.status in STICKY_STATUSES for cause in _causes(error)):
        return True
    for device in _used_devices:
        try:
            with cp.cuda.Device(device):
                cp.cuda.runtime.memGetInfo()
        except cuda_errors as lost:
            if lost.status in STICKY_STATUSES:
                return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and the chain of errors that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
