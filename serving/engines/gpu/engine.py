"""What the GPU decoder and encoder ask of an engine, whichever runs it: tensorrt.py or onnxruntime.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import cupy as cp

from serving.contract.tensors import GraphTensors


class Call(Protocol):
    """An engine with its inputs and outputs bound."""

    def enqueue(self, stream: cp.cuda.Stream) -> None:
        """Run on `stream`, without waiting."""


class GpuEngine(Protocol):
    """What runs a graph on the GPU: TensorRT, or ONNX Runtime's CUDA provider."""

    capturable: bool  # whether an enqueued call may be captured into a CUDA graph
    weight_bytes: int

    def bind(self, inputs: Mapping[str, cp.ndarray], outputs: Mapping[str, cp.ndarray], *, context: int = 0) -> Call:
        """Bind contiguous arrays by tensor name. A later `bind` of the same profile and `context` takes the place of this one.

        What is captured into a graph must not meet other shapes later: each batch size has a context of its own.
        """
        ...


class Scratch:
    """Activation memory that engines share which never run at the same time."""

    def __init__(self) -> None:
        self.bytes = 0
        self._memory: Any = None

    def reserve(self, size: int) -> None:
        """Make it at least so large; before its address is first asked for."""
        assert self._memory is None or size <= self.bytes, "scratch memory must be reserved before it is used"
        self.bytes = max(self.bytes, size)

    def address(self) -> int:
        """Device address; allocates on first use."""
        if self._memory is None:
            self._memory = cp.cuda.alloc(max(self.bytes, 1))
        return int(self._memory.ptr)


LoadEngine = Callable[[str, GraphTensors, Scratch], GpuEngine]
