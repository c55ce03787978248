"""A graph on ONNX Runtime's CUDA provider, for a GPU without TensorRT.

In: a verified ONNX file and CuPy arrays. Out: calls that run on a stream. It is slower than TensorRT because its calls cannot be captured
into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cupy as cp
import onnxruntime as ort

from serving.contract.manifest import EngineError, Manifest, ManifestError
from serving.contract.tensors import GraphTensors

PROVIDER = "CUDAExecutionProvider"


class OnnxCall:
    """A session with its I/O binding."""

    def __init__(self, session: Any, binding: Any, options: Any):
        self._session, self._binding, self._options = session, binding, options

    def enqueue(self, stream: cp.cuda.Stream) -> None:
        """Run on the stream that was current when the engine was made, whatever `stream` is, without waiting for the result."""
        self._session.run_with_iobinding(self._binding, self._options)


class OnnxGpuEngine:
    """One session. It runs on the stream that is CuPy's current one when the engine is made.

    Raises:
        ManifestError: if the file is missing or altered.
        EngineError: if ONNX Runtime has no CUDA provider or cannot load the graph.
    """

    capturable = False

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, device: int):
        file = manifest.engine_file(name)
        path = directory / file
        if PROVIDER not in ort.get_available_providers():
            raise EngineError(f"{path}: this onnxruntime has no {PROVIDER}; install onnxruntime-gpu in its place")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        provider = (PROVIDER, {"device_id": device, "user_compute_stream": str(cp.cuda.get_current_stream().ptr)})
        try:
            with manifest.verified(directory, (file,)):
                self._session = ort.InferenceSession(str(path), options, providers=[provider])
        except ManifestError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise EngineError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        if PROVIDER not in self._session.get_providers():
            raise EngineError(f"{path}: ONNX Runtime fell back to the CPU: its CUDA libraries are missing; see its log")
        self._device = device
        self.weight_bytes = path.stat().st_size
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: Mapping[str, cp.ndarray], outputs: Mapping[str, cp.ndarray], *, context: int = 0) -> OnnxCall:
        """Bind contiguous arrays by tensor name. Every binding is independent of the others."""
        binding = self._session.io_binding()
        for arrays, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, array in arrays.items():
                bind(name, "cuda", self._device, array.dtype.type, array.shape, array.data.ptr)
        return OnnxCall(self._session, binding, self._options)
