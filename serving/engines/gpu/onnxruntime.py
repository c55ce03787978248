"""ONNX Runtime's CUDA provider behind the same interface as TensorRT: for a GPU without TensorRT. Slower, as a step is not captured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cupy as cp
import onnxruntime as ort

from serving.contract.manifest import EngineError, Manifest
from serving.contract.tensors import GraphTensors

PROVIDER = "CUDAExecutionProvider"


class OnnxCall:
    """An I/O binding."""

    def __init__(self, session: Any, binding: Any, options: Any):
        self._session, self._binding, self._options = session, binding, options

    def enqueue(self, stream: cp.cuda.Stream) -> None:
        """Run on the stream that was current when the engine was made, without waiting."""
        self._session.run_with_iobinding(self._binding, self._options)


class OnnxGpuEngine:
    """One graph in a session whose work goes to CuPy's current stream of the moment it is made."""

    capturable = False

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, device: int):
        file = manifest.engine_file(name)
        manifest.verify(directory, (file,))
        if PROVIDER not in ort.get_available_providers():
            raise EngineError(f"{directory / file}: this onnxruntime has no {PROVIDER}; install onnxruntime-gpu in its place")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider = (PROVIDER, {"device_id": device, "user_compute_stream": str(cp.cuda.get_current_stream().ptr)})
        try:
            self._session = ort.InferenceSession(str(directory / file), options, providers=[provider])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise EngineError(f"{directory / file}: ONNX Runtime cannot load it: {error}") from error
        if PROVIDER not in self._session.get_providers():
            raise EngineError(f"{directory / file}: ONNX Runtime fell back to the CPU: its CUDA libraries are missing; see its log")
        self._device = device
        self.weight_bytes = (directory / file).stat().st_size
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: Mapping[str, cp.ndarray], outputs: Mapping[str, cp.ndarray], *, context: int = 0) -> OnnxCall:
        """Bind contiguous arrays by tensor name."""
        binding = self._session.io_binding()
        for arrays, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, array in arrays.items():
                bind(name, "cuda", self._device, array.dtype.type, array.shape, array.data.ptr)
        return OnnxCall(self._session, binding, self._options)
