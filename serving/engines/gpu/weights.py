"""Loads the GEMMs of a stack and the arrays of its kernels to the GPU, from verified files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import cupy as cp
import numpy as np

from serving.contract.gemms import Gemm, StackName, StackSizes, array_file, gemm_tensors
from serving.contract.manifest import Manifest

from .engine import GpuEngine, LoadEngine, Scratch
from .kernels import SkinnyGemm


class LoadedGemm:
    """One GEMM: the engine of its kind, its weights, and the kernel that replaces the engine for few rows."""

    def __init__(self, engine: GpuEngine, weight: cp.ndarray, skinny_gemm: SkinnyGemm | None = None):
        self.engine, self.weight, self.skinny_gemm = engine, weight, skinny_gemm

    def enqueue(self, x: cp.ndarray, y: cp.ndarray, stream: cp.cuda.Stream, context: int = 0) -> None:
        """Enqueue y = x @ weight on `stream`, which must be the current one; does not wait."""
        if self.skinny_gemm is not None and self.skinny_gemm.takes(x, self.weight):
            self.skinny_gemm.multiply(x, self.weight, y)
        else:
            self.engine.bind({"x": x, "weight": self.weight}, {"y": y}, context=context).enqueue(stream)


def load_arrays(directory: Path, manifest: Manifest, stack: StackName, names: Sequence[str]) -> list[cp.ndarray]:
    """Load arrays of a stack to the GPU.

    Raises:
        ManifestError: if a file is missing or altered.
    """
    return [load_array(directory, manifest, array_file(stack, name)) for name in names]


def load_gemms(
    directory: Path,
    manifest: Manifest,
    stack: StackSizes,
    gemms: Sequence[Gemm],
    load: LoadEngine,
    scratch: Scratch,
    skinny_gemm: SkinnyGemm | None = None,
) -> dict[Gemm, LoadedGemm]:
    """Load GEMMs of a stack with their weights to the GPU, in the order of `gemms`.

    GEMMs of one kind share an engine; all share `skinny_gemm`.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if an engine cannot run here.
    """
    engines: dict[str, GpuEngine] = {}
    loaded = {}
    for gemm in gemms:
        if gemm.engine not in engines:
            tensors = gemm_tensors(stack, gemm, manifest.precision)
            engines[gemm.engine] = load(gemm.engine, tensors, scratch)
        loaded[gemm] = LoadedGemm(engines[gemm.engine], load_array(directory, manifest, gemm.weight), skinny_gemm)
    return loaded


def weight_bytes(gemms: Mapping[Gemm, LoadedGemm]) -> int:
    """Bytes of the GEMMs' weights and of the engines that they share."""
    engines = {id(loaded.engine): loaded.engine for loaded in gemms.values()}
    return sum(loaded.weight.nbytes for loaded in gemms.values()) + sum(engine.weight_bytes for engine in engines.values())


def load_array(directory: Path, manifest: Manifest, file: str) -> cp.ndarray:
    """Load one file to the GPU.

    Raises:
        ManifestError: if it is missing or altered.
    """
    return cp.asarray(np.load(io.BytesIO(manifest.read(directory, file)), allow_pickle=False))
