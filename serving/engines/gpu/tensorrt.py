"""A TensorRT engine on the current CUDA device.

In: a verified plan file and CuPy arrays. Out: calls that are enqueued on a stream. An engine that was built for another GPU or another
TensorRT is refused. Works with TensorRT 8.6, 10 and 11.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cupy as cp
import tensorrt as trt

from serving.contract.manifest import REBUILD, EngineError, Manifest
from serving.contract.profiles import choose_profile
from serving.contract.tensors import GraphTensors

from .device import build_target
from .engine import Scratch

# TensorRT's names of types; an array of another type would be read as if it had this one.
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32"}


@functools.cache
def _runtime() -> Any:
    """The runtime of all engines of the process. TensorRT has one logger per process: that of the first runtime."""
    return trt.Runtime(_logger())


@functools.cache
def _logger() -> Any:
    return trt.Logger(trt.Logger.WARNING)


class TensorRTCall:
    """An execution context whose shapes and addresses are set."""

    def __init__(self, context: Any, file: str):
        self._context, self._file = context, file

    def enqueue(self, stream: cp.cuda.Stream) -> None:
        """Run on `stream`, without waiting for the result.

        Raises:
            EngineError: if TensorRT refuses; its log says why.
        """
        if not self._context.execute_async_v3(stream.ptr):
            raise EngineError(f"{self._file}: TensorRT did not run it; its log says why")


class TensorRTEngine:
    """One engine. It creates an execution context for each profile and `context` that `bind` asks for.

    Raises:
        ManifestError: if the plan file is missing or altered.
        EngineError: if the plan was built for another GPU or TensorRT, cannot be loaded, or has other tensors than `tensors`.
    """

    capturable = True

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, scratch: Scratch):
        self._file = file = manifest.engine_file(name)
        path = str(directory / file)
        if manifest.build is None:
            raise EngineError(f"{path}: the manifest does not say which GPU it was built for; {REBUILD}")
        manifest.build.require_target(path, build_target())
        self._profiles = manifest.build.profiles[file]
        plan = manifest.read(directory, file)
        self._engine = _runtime().deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{path}: TensorRT {trt.__version__} cannot load it; {REBUILD}")
        found = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        wanted = [spec.name for spec in (*tensors.inputs, *tensors.outputs)]
        if sorted(found) != sorted(wanted):
            raise EngineError(f"{path}: wanted tensors {wanted}, got {found}; {REBUILD}")
        types = {name: TYPES.get(self._engine.get_tensor_dtype(name).name, "another type") for name in found}
        other = [f"{spec.name}: {types[spec.name]}" for spec in (*tensors.inputs, *tensors.outputs) if types[spec.name] != spec.dtype]
        if other:
            raise EngineError(
                f"{path}: wanted {', '.join(map(str, (*tensors.inputs, *tensors.outputs)))}, got {', '.join(other)}; {REBUILD}"
            )
        self._inputs = [spec.name for spec in tensors.inputs]
        self.weight_bytes = len(plan)
        self._scratch = scratch
        scratch.reserve(_activation_bytes(self._engine))
        self._contexts: dict[tuple[int, int], Any] = {}

    def _context(self, profile: int, number: int) -> Any:
        if (profile, number) not in self._contexts:
            self._contexts[profile, number] = self._new_context(profile)
        return self._contexts[profile, number]

    def _new_context(self, profile: int) -> Any:
        if hasattr(self._engine, "create_execution_context_without_device_memory"):
            context = self._engine.create_execution_context_without_device_memory()
        else:  # TensorRT 11
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._scratch.address(), self._scratch.bytes)
        else:  # TensorRT 8.6
            context.device_memory = self._scratch.address()
        stream = cp.cuda.Stream(non_blocking=True)
        if not context.set_optimization_profile_async(profile, stream.ptr):
            raise EngineError(f"{self._file}: TensorRT cannot set profile {profile}; its log says why")
        stream.synchronize()
        return context

    def bind(self, inputs: Mapping[str, cp.ndarray], outputs: Mapping[str, cp.ndarray], *, context: int = 0) -> TensorRTCall:
        """Bind contiguous arrays by tensor name. A later `bind` with the same profile and `context` replaces this one.

        Raises:
            EngineError: if no profile covers the shapes, or TensorRT refuses a shape or an address.
        """
        shapes = {name: inputs[name].shape for name in self._inputs}
        profile = choose_profile(self._profiles, shapes)
        if profile is None:
            largest = [{name: list(spans[2]) for name, spans in ranges.items()} for ranges in self._profiles]
            raise EngineError(
                f"{self._file}: no profile covers the shapes {shapes}, the largest are {largest}; lower the limits or rebuild"
            )
        bound = self._context(profile, context)
        for name, array in inputs.items():
            if not bound.set_input_shape(name, array.shape):
                raise EngineError(f"{self._file}: {name}: TensorRT refuses the shape {list(array.shape)}; its log says why")
        for name, array in (*inputs.items(), *outputs.items()):
            assert array.flags.c_contiguous, name
            if not bound.set_tensor_address(name, array.data.ptr):
                raise EngineError(f"{self._file}: {name}: TensorRT refuses the address {array.data.ptr:#x}; its log says why")
        return TensorRTCall(bound, self._file)


def _activation_bytes(engine: Any) -> int:
    """Device memory that a context of the engine needs; 0 is an answer too."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)  # TensorRT 8.6
