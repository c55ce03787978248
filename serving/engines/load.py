"""Loads the engines of a reader: on the CPU or a GPU, as its manifest says.

In: the engines' directory, its manifest, the limits. Out: an Encoder, a Packer, a Decoder. CuPy, TensorRT and OpenVINO are imported only
for a reader that uses them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from serving.contract.kv_memory import KVBudget, cache_capacities, plan
from serving.contract.limits import Limits
from serving.contract.manifest import FLOAT8, EngineError, Manifest, ManifestError
from serving.contract.profiles import require_covered
from serving.contract.tensors import GraphTensors

from .base import Decoder, Encoder, Packer
from .cpu import CpuDecoder, CpuEncoder, OnnxDecoder, OnnxEncoder
from .packing import HostPacker

CROSS_KV_PRECISIONS = ("float16", FLOAT8)
# Of a cached key or value, unless it is in FP8.
BYTES_PER_ELEMENT = {"onnxruntime": 4, "openvino": 4, "onnxruntime-gpu": 2, "tensorrt": 2}

SMALL_STEP_BYTES = 64 << 20  # of weights, which a CPU's caches hold


def kv_budget(manifest: Manifest, limits: Limits) -> KVBudget:
    """The reader's slots, and its bytes of keys and values per question.

    Raises:
        LimitsError: if kv_cache_bytes does not allow one slot.
        ManifestError: if the backend is unknown.
    """
    return plan(manifest.sizes, limits, manifest.prompt.passage_length, bytes_per_element(manifest), cross_kv_bytes_per_element(manifest))


def bytes_per_element(manifest: Manifest) -> int:
    """Bytes of one number in the caches.

    Raises:
        ManifestError: if the backend is unknown.
    """
    if manifest.engine not in BYTES_PER_ELEMENT:
        raise ManifestError(f"engine: wanted one of {', '.join(BYTES_PER_ELEMENT)}, got {manifest.engine!r}; `make export` makes it again")
    return 2 if manifest.has_bf16_caches else BYTES_PER_ELEMENT[manifest.engine]


def cross_kv_bytes_per_element(manifest: Manifest) -> int:
    """Bytes of one number that cross-attention reads.

    Raises:
        ManifestError: if the backend or the type is unknown.
    """
    of_others, found = bytes_per_element(manifest), manifest.cross_kv_precision
    if found not in CROSS_KV_PRECISIONS:
        wanted = " or ".join(CROSS_KV_PRECISIONS)
        raise ManifestError(f"cross_kv_precision: wanted {wanted}, got {found!r}; `make export` makes it again")
    return 1 if manifest.on_gpu and found == FLOAT8 else of_others


def load_encoder(directory: Path, manifest: Manifest, limits: Limits, device: int = 0) -> Encoder:
    """Load the encoder. On a GPU, `device` becomes this thread's current device.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if an engine cannot run here.
        LimitsError: if the limits exceed what the engines were built for.
    """
    if not manifest.on_gpu:
        return cpu_engines(directory, manifest)[0](directory, manifest, limits.intra_op_threads)
    load = gpu_loader(directory, manifest, limits, device)
    if manifest.is_whole:
        from .whole import WholeEncoder

        return WholeEncoder(directory, manifest, load, limits)
    from .gpu.encoder import GpuEncoder

    return GpuEncoder(directory, manifest, load, limits)


def load_packer(directory: Path, manifest: Manifest, device: int = 0) -> Packer:
    """Load what packs the encoder's hidden states. On a GPU, `device` becomes this thread's current device.

    Raises:
        EngineError: if the GPU cannot be used.
    """
    if not manifest.on_gpu:
        return HostPacker()
    _use_device(directory, device)
    from .gpu.packing import GpuPacker

    return GpuPacker()


def decoder_threads(directory: Path, manifest: Manifest, limits: Limits) -> int:
    """Threads of a decoder's engines on the CPU; 0 = one per core.

    A step reads all its weights for a few rows. Where they lie in the CPU's caches, threads wait for each other longer than they compute:
    a step of the demo's FiD takes 0.67 ms on one thread and 0.85 on two, of a base reader 51 and 29.
    """
    if limits.intra_op_threads:
        return limits.intra_op_threads
    files = [directory / file for file in manifest.files if file.startswith("decoder_step")]
    weights = sum(file.stat().st_size for file in files if file.is_file())  # a missing one is named when it is loaded
    return 1 if weights < SMALL_STEP_BYTES else 0


def load_decoder(directory: Path, manifest: Manifest, limits: Limits, device: int = 0) -> Decoder:
    """Load the decoder, with as many slots as the limits and the memory budget allow. On a GPU as `load_encoder`.

    Raises:
        ManifestError, EngineError, LimitsError: as `load_encoder`, and LimitsError if kv_cache_bytes does not allow one slot.
    """
    slots = kv_budget(manifest, limits).slots
    if not manifest.on_gpu:
        return cpu_engines(directory, manifest)[1](directory, manifest, slots, decoder_threads(directory, manifest, limits))
    load = gpu_loader(directory, manifest, dataclasses.replace(limits, slots=slots), device)
    capacities = cache_capacities(limits, manifest.prompt.passage_length)
    if manifest.is_whole:
        from .whole import WholeDecoder

        return WholeDecoder(directory, manifest, load, slots, capacities)
    from .gpu.decoder import GpuDecoder

    return GpuDecoder(directory, manifest, load, slots, capacities)


def cpu_engines(directory: Path, manifest: Manifest) -> tuple[type[CpuEncoder], type[CpuDecoder]]:
    """The encoder and the decoder of the manifest's backend.

    Raises:
        EngineError: if the backend is not installed, or cannot run the manifest's precision.
    """
    if manifest.engine == "openvino":
        try:
            from .openvino import OpenVinoDecoder, OpenVinoEncoder
        except (ImportError, OSError) as error:
            advice = "`make setup FOR=openvino` installs it, `make export ENGINE=onnxruntime` does without"
            raise EngineError(f"{directory}: made for openvino, which cannot be loaded ({error}); {advice}") from error
        return OpenVinoEncoder, OpenVinoDecoder
    return OnnxEncoder, OnnxDecoder


def gpu_loader(directory: Path, manifest: Manifest, limits: Limits, device: int) -> Any:
    """A `LoadEngine` (gpu/engine.py) for the manifest's backend. `device` becomes this thread's current device.

    Raises:
        EngineError: if the GPU or the backend cannot be used.
    """
    bytes_per_element(manifest)  # refuses an unknown backend
    _use_device(directory, device)
    try:
        if manifest.engine == "tensorrt":
            from .gpu.tensorrt import TensorRTEngine
        else:
            from .gpu.onnxruntime import OnnxGpuEngine
    except ImportError as error:
        raise EngineError(f"{directory}: made for {manifest.engine}, which is not installed ({error}); see requirements-gpu.txt") from error

    def load(name: str, tensors: GraphTensors, scratch: Any) -> Any:
        if manifest.build is not None:
            file = manifest.engine_file(name)
            profiles = manifest.build.profiles[file]
            require_covered(str(directory / file), name, tensors, profiles, limits, manifest.prompt.passage_length)
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
