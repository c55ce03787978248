"""A reader on the CPU, by OpenVINO: the same graphs, slots and caches as cpu.py, in fp32, bf16 or int8.

A graph is compiled once, for all shapes. Caches are shared with OpenVINO and never copied; in bf16 they are bf16 as well, half as large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino as ov
from openvino.preprocess import PrePostProcessor

from serving.contract.manifest import EngineError, Manifest, ManifestError, require_bf16
from serving.contract.tensors import NUMPY_DTYPES, GraphTensors

from .cpu import LOGITS, CpuDecoder, CpuEncoder, require_tensors

# Kernels kept for shapes seen before. OpenVINO's own 5,000 let a bf16 encoder that meets ever new shapes grow by hundreds of megabytes.
KEPT_KERNELS = 500


class OpenVinoSession:
    """One graph on OpenVINO's CPU plugin.

    Raises:
        ManifestError: if its file is not the manifest's.
        EngineError: if OpenVINO cannot load it, its tensors are not `tensors`, or this CPU would emulate its precision.
    """

    def __init__(self, directory: Path, manifest: Manifest, name: str, tensors: GraphTensors, threads: int, lanes: int = 1):
        path = directory / manifest.engine_file(name)
        bf16 = manifest.has_bf16_caches
        if bf16:
            require_bf16(str(directory))
        self.cache_dtype = np.dtype(NUMPY_DTYPES["bfloat16" if bf16 else "float32"])
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": lanes,
            "ENABLE_CPU_PINNING": False,  # each process would pin its threads to the same cores
            "CPU_RUNTIME_CACHE_CAPACITY": KEPT_KERNELS,
        }
        core = ov.Core()
        try:
            with manifest.verified(directory, (path.name,)):
                model = core.read_model(path)
                inputs, outputs = ([port.get_any_name() for port in ports] for ports in (model.inputs, model.outputs))
                require_tensors(path, tensors, inputs, outputs)
                self._compiled = core.compile_model(_with_bf16_caches(model) if bf16 else model, "CPU", settings)
        except (ManifestError, EngineError):
            raise
        except Exception as error:  # openvino's exceptions have no common base class
            raise EngineError(f"{path}: OpenVINO cannot load it: {error}") from error
        self._lanes = [_Lane(self._compiled.create_infer_request()) for _ in range(lanes)]
        self._ports = {name: (i, port.get_element_type()) for i, (name, port) in enumerate(zip(inputs, self._compiled.inputs, strict=True))}
        self._dtypes = {spec.name: self.cache_dtype if _is_cache(spec.name) else NUMPY_DTYPES[spec.dtype] for spec in tensors.inputs}
        self._outputs = [(i, _is_cache(name)) for i, name in enumerate(outputs)]
        self._has_logits = outputs[-1] == LOGITS

    def run(self, inputs: Mapping[str, np.ndarray], *, logits: bool = False, lane: int = 0) -> list[np.ndarray]:
        """As Session.run. An array that is given again, whatever it holds by then, costs nothing: its memory is known."""
        request, known = self._lanes[lane].request, self._lanes[lane].given
        for name, array in inputs.items():
            given, read = known.get(name, (None, None))
            if given is not array or read is not array:
                index, element_type = self._ports[name]
                read = np.ascontiguousarray(array, self._dtypes[name])
                request.set_input_tensor(index, ov.Tensor(read, read.shape, element_type))
                known[name] = array, read
        request.infer(share_outputs=True)
        outputs = self._outputs if logits or not self._has_logits else self._outputs[:-1]
        found = [(request.get_output_tensor(i).data, cache) for i, cache in outputs]
        return [data.view(self.cache_dtype) if cache else data for data, cache in found]  # NumPy has no bf16: its bits as uint16


@dataclasses.dataclass
class _Lane:
    """One request at a time. `given`: input -> the array it was given, and the one whose memory it reads."""

    request: ov.InferRequest
    given: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)


def _is_cache(name: str) -> bool:
    """Whether a tensor holds keys or values: `past_key_values.*` and `present.*`."""
    return name.startswith(("past_key_values.", "present."))


def _with_bf16_caches(model: ov.Model) -> ov.Model:
    """The model with keys and values in bf16 at its inputs and outputs: converting them at every step would cost more than the step."""
    changed = PrePostProcessor(model)
    for ports, of in ((model.inputs, changed.input), (model.outputs, changed.output)):
        for name in (port.get_any_name() for port in ports):
            if _is_cache(name):
                of(name).tensor().set_element_type(ov.Type.bf16)
    return changed.build()


class OpenVinoEncoder(CpuEncoder):
    """The encoder on OpenVINO."""

    session_type = OpenVinoSession


class OpenVinoDecoder(CpuDecoder):
    """The decoder on OpenVINO."""

    session_type = OpenVinoSession
