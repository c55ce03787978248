"""A TensorRT engine on the current CUDA device: loaded from a verified file, bound to CuPy arrays, enqueued on a stream.

It is refused where it was not built for this GPU and this TensorRT. Works with TensorRT 8.6 and later; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cupy as cp
import tensorrt as trt

from serving.contract.gpu_profiles import choose_profile
from serving.contract.manifest import REBUILD, EngineError, Manifest
from serving.contract.tensors import GraphTensors

from .engine import Scratch


def this_gpu() -> tuple[str, str]:
    """Name and compute capability of the current device."""
    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    return properties["name"].decode(), f"{properties['major']}.{properties['minor']}"


class TensorRTCall:
    """A context whose shapes and addresses are set."""

    def __init__(self, context: Any, name: str):
        self._context, self._name = context, name

    def enqueue(self, stream: cp.cuda.Stream) -> None:
        """Run on `stream`, without waiting.

        Raises:
            EngineError: if TensorRT refuses; its log says why.
        """
        if not self._context.execute_async_v3(stream.ptr):
            raise EngineError(f"{self._name}: TensorRT did not run it")


class TensorRTEngine:
    """One engine and its contexts, made when first needed."""

    capturable = True

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, scratch: Scratch):
        self._file = file = manifest.engine_file(name)
        manifest.verify(directory, (file,))
        self._logger = trt.Logger(trt.Logger.WARNING)
        if manifest.build is None:
            raise EngineError(f"{directory / file}: the manifest does not say what it was built for; {REBUILD}")
        manifest.build.require_here(str(directory / file), *this_gpu(), trt.__version__)
        self._profiles = manifest.build.profiles[file]
        plan = (directory / file).read_bytes()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"{directory / file}: TensorRT {trt.__version__} cannot load it; {REBUILD}")
        found = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        wanted = [spec.name for spec in (*tensors.inputs, *tensors.outputs)]
        if sorted(found) != sorted(wanted):
            raise EngineError(f"{directory / file}: wanted tensors {wanted}, got {found}; {REBUILD}")
        self._inputs = [spec.name for spec in tensors.inputs]
        self.weight_bytes = len(plan)
        self._scratch = scratch
        scratch.reserve(int(getattr(self._engine, "device_memory_size_v2", None) or self._engine.device_memory_size))
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
        else:
            context.device_memory = self._scratch.address()
        stream = cp.cuda.Stream(non_blocking=True)
        if not context.set_optimization_profile_async(profile, stream.ptr):
            raise EngineError(f"{self._file}: profile {profile} cannot be set")
        stream.synchronize()
        return context

    def bind(self, inputs: Mapping[str, cp.ndarray], outputs: Mapping[str, cp.ndarray], *, context: int = 0) -> TensorRTCall:
        """Bind contiguous arrays by tensor name. A later `bind` of the same profile and `context` takes the place of this one.

        Raises:
            EngineError: if no profile covers the shapes.
        """
        shapes = {name: inputs[name].shape for name in self._inputs}
        profile = choose_profile(self._profiles, shapes)
        if profile is None:
            most = [{name: list(spans[2]) for name, spans in listed.items()} for listed in self._profiles]
            raise EngineError(
                f"{self._file}: shapes {shapes} are in none of its profiles, which go up to {most}; lower the limits or rebuild"
            )
        bound = self._context(profile, context)
        for name, array in inputs.items():
            if not bound.set_input_shape(name, array.shape):
                raise EngineError(f"{self._file}: {name} may not have shape {list(array.shape)}")
        for name, array in (*inputs.items(), *outputs.items()):
            assert array.flags.c_contiguous, name
            bound.set_tensor_address(name, array.data.ptr)
        return TensorRTCall(bound, self._file)
