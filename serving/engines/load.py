"""Which engine runs a reader: the manifest says, and what that needs is imported here and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.contract.gpu_profiles import cache_capacities
from serving.contract.kv_memory import KVBudget, plan
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, ManifestError
from serving.contract.tensors import GraphTensors

from .base import Decoder, Encoder, Packer
from .cpu import OnnxDecoder, OnnxEncoder
from .packing import HostPacker

BYTES_PER_ELEMENT = {"onnxruntime": 4, "onnxruntime-gpu": 2, "tensorrt": 2}  # of a cached key


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


def load_packer(directory: Path, manifest: Manifest, device: int = 0) -> Packer:
    """What packs this reader's hidden states; on a GPU on `device`, which becomes this thread's current one."""
    if not manifest.on_gpu:
        return HostPacker()
    _use_device(directory, device)
    from .gpu.packing import GpuPacker

    return GpuPacker()


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
    _use_device(directory, device)
    try:
        if manifest.engine == "tensorrt":
            from .gpu.tensorrt import TensorRTEngine
        else:
            from .gpu.onnxruntime import OnnxGpuEngine
    except ImportError as error:
        raise EngineError(f"{directory}: made for {manifest.engine}, which is not installed ({error}); see requirements-gpu.txt") from error

    def load(name: str, tensors: GraphTensors, scratch: Any) -> Any:
        if manifest.engine == "tensorrt":
            return TensorRTEngine(directory, manifest, name, tensors, scratch)
        return OnnxGpuEngine(directory, manifest, name, tensors, device)

    return load


def _use_device(directory: Path, device: int) -> None:
    from .gpu.device import use_device

    try:
        use_device(device)
    except EngineError as error:
        raise EngineError(f"{directory}: {error}") from error
