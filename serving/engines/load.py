"""Which engine runs a reader: the manifest says, and what that needs is imported here and only then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from serving.contract.gpu_profiles import cache_capacities
from serving.contract.kv_memory import KVBudget, plan
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, ManifestError
from serving.contract.tensors import GraphTensors
from serving.pipeline.scheduler import DecoderEngine

from .cpu import OnnxDecoder, OnnxEncoder

BYTES_PER_ELEMENT = {"onnxruntime": 4, "onnxruntime-gpu": 2, "tensorrt": 2}  # of a cached key


class Encoder(Protocol):
    """Passages of several questions in, hidden states out: see OnnxEncoder and GpuEncoder."""

    def encode(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[Any]:
        """Hidden states a question, from (input_ids, attention_mask) a question."""
        ...


class Decoder(DecoderEngine, Protocol):
    """A decoder engine that also packs hidden states where it wants them."""

    def pack(self, states: Any, mask: np.ndarray) -> Any:
        """The valid hidden states of some passages, one after the other, wherever the decoder wants them."""
        ...

    def join(self, pieces: Sequence[Any]) -> Any:
        """What `pack` made of a question's passages, some at a time, as one."""
        ...


def kv_budget(manifest: Manifest, limits: Limits) -> KVBudget:
    """Slots and bytes a question for this reader on this engine."""
    return plan(manifest.sizes, limits, manifest.prompt.passage_length, bytes_per_element(manifest))


def bytes_per_element(manifest: Manifest) -> int:
    """Bytes of one number in the caches.

    Raises:
        ManifestError: if the engine is none that is known here.
    """
    if manifest.engine not in BYTES_PER_ELEMENT:
        raise ManifestError(f"engine: wanted one of {', '.join(BYTES_PER_ELEMENT)}, got {manifest.engine!r}; `make export` makes it again")
    return BYTES_PER_ELEMENT[manifest.engine]


def load_encoder(directory: Path, manifest: Manifest, limits: Limits, device: int = 0) -> Encoder:
    """The encoder of a reader; on a GPU on the current device of this thread, which becomes `device`."""
    if not manifest.on_gpu:
        return OnnxEncoder(directory, manifest, limits.intra_op_threads)
    load = _gpu_loader(directory, manifest, device)
    from serving.engines.gpu.encoder import GpuEncoder

    return GpuEncoder(directory, manifest, load, limits)


def load_decoder(directory: Path, manifest: Manifest, limits: Limits, device: int = 0) -> Decoder:
    """The decoder of a reader with as many slots as the budget affords."""
    slots = kv_budget(manifest, limits).slots
    if not manifest.on_gpu:
        return OnnxDecoder(directory, manifest, slots, limits.intra_op_threads)
    load = _gpu_loader(directory, manifest, device)
    from serving.engines.gpu.decoder import GpuDecoder

    return GpuDecoder(directory, manifest, load, slots, cache_capacities(limits, manifest.prompt.passage_length))


def _gpu_loader(directory: Path, manifest: Manifest, device: int) -> Any:
    """Makes the engine of a name, after the device was made this thread's."""
    bytes_per_element(manifest)  # refuses an engine that nobody knows
    try:
        import cupy as cp

        cp.cuda.Device(device).use()
    except ImportError as error:
        raise EngineError(
            f"{directory}: engines for the GPU need CuPy, which is not installed ({error}); see requirements-gpu.txt"
        ) from error
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise EngineError(f"{directory}: engines for the GPU, but CUDA device {device} cannot be used ({error})") from error
    try:
        if manifest.engine == "tensorrt":
            from serving.engines.gpu.tensorrt import TensorRTEngine
        else:
            from serving.engines.gpu.onnxruntime import OnnxGpuEngine
    except ImportError as error:
        raise EngineError(f"{directory}: made for {manifest.engine}, which is not installed ({error}); see requirements-gpu.txt") from error

    def load(name: str, tensors: GraphTensors, scratch: Any) -> Any:
        if manifest.engine == "tensorrt":
            return TensorRTEngine(directory, manifest, name, tensors, scratch)
        return OnnxGpuEngine(directory, manifest, name, tensors, device)

    return load
