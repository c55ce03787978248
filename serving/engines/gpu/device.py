"""The CUDA devices of this process: which ones it uses, and whether an error has made one unusable.

Importable without CuPy: every function imports it when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from serving.contract.manifest import EngineError

# Errors after which every later CUDA call of the process fails (CUresult and cudaError_t share these numbers). No call clears them.
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
    """Make `device` the current one of this thread, and remember that this process uses it.

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


def is_sticky(error: BaseException) -> bool:
    """Whether `error`, or an error that caused it, has left a device of this process unusable.

    A library may hide the CUDA error behind one of its own. Therefore each device is also asked for its free memory, which does not wait
    for running work and fails on a device that is lost.
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
    """`error`, and the errors while handling which it was raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
