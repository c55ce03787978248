"""Which errors end the process: those after which CUDA works no more, also where a library hides them."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from serving.contract.manifest import EngineError
from serving.engines.base import is_fatal
from tests.serving.engines import fake_cupy

ILLEGAL_ADDRESS, OUT_OF_MEMORY = 700, 2


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that uses CUDA device 1."""
    from serving.engines.gpu import device

    for name, module in fake_cupy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(device, "_used_devices", set())
    device.use_device(1)
    return sys.modules["cupy"]


def test_a_sticky_cuda_error_is_fatal_and_others_are_not(cupy: Any) -> None:
    assert is_fatal(fake_cupy.CudaError(ILLEGAL_ADDRESS))
    assert not is_fatal(fake_cupy.CudaError(OUT_OF_MEMORY))
    assert not is_fatal(EngineError("the question is longer than a slot"))


@pytest.mark.parametrize("explicit", [True, False])
def test_an_error_that_a_sticky_one_caused_is_fatal(cupy: Any, explicit: bool) -> None:
    try:
        try:
            raise fake_cupy.CudaError(ILLEGAL_ADDRESS)
        except fake_cupy.CudaError as error:
            if explicit:
                raise EngineError("step") from error
            raise EngineError("step")  # noqa: B904
    except EngineError as error:
        assert is_fatal(error)


def test_any_error_is_fatal_once_the_device_is_lost(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Device(fake_cupy.Context):
        def __init__(self, number: int):
            entered.append(number)

    def lost() -> None:
        raise fake_cupy.CudaError(ILLEGAL_ADDRESS)

    monkeypatch.setattr(cupy.cuda, "Device", Device)
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lost)
    assert is_fatal(EngineError("TensorRT did not run it"))
    assert entered == [1], "the device that the process uses, whatever this thread's is"


def test_nothing_is_fatal_without_a_gpu() -> None:
    assert "cupy" not in sys.modules
    assert not is_fatal(RuntimeError("anything"))
