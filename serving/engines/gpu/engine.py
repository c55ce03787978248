"""The interface of one engine on a GPU, which tensorrt.py and onnxruntime.py implement, and the memory that engines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import cupy as cp

from serving.contract.tensors import GraphTensors


class Call(Protocol):
    """An engine whose inputs and outputs are bound."""

    def enqueue(self, stream: cp.cuda.Stream) -> None:
        """Run on `stream`, without waiting for the result.

        Raises:
            EngineError: if the engine refuses to run.
        """


class GpuEngine(Protocol):
    """One graph on a GPU.

    Attributes:
        capturable: whether an enqueued call may be captured into a CUDA graph.
        weight_bytes: device memory of the weights that the engine contains.
    """

    capturable: bool
    weight_bytes: int

    def bind(self, inputs: Mapping[str, cp.ndarray], outputs: Mapping[str, cp.ndarray], *, context: int = 0) -> Call:
        """Bind contiguous arrays by tensor name.

        A later `bind` with the same profile and `context` replaces this one. A call that was captured into a CUDA graph must keep its
        binding: each captured batch size uses a context of its own.
        """
        ...


class Scratch:
    """Device memory for activations, shared by engines that never run at the same time.

    Attributes:
        bytes: its size.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._memory: Any = None

    def reserve(self, size: int) -> None:
        """Make it at least `size` bytes large. Call it for all engines before the first `address`."""
        assert self._memory is None or size <= self.bytes, "scratch memory must be reserved before it is used"
        self.bytes = max(self.bytes, size)

    def address(self) -> int:
        """Its device address; the first call allocates it."""
        if self._memory is None:
            self._memory = cp.cuda.alloc(max(self.bytes, 1))
        return int(self._memory.ptr)


# Loads an engine by its name; an engine reserves its activations in the scratch memory.
LoadEngine = Callable[[str, GraphTensors, Scratch], GpuEngine]
