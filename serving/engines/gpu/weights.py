"""The gemms of a stack and the arrays of its kernels, loaded to the GPU from verified files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cupy as cp
import numpy as np

from serving.contract.gemms import Gemm, StackName, StackSizes, array_file, gemm_tensors
from serving.contract.manifest import Manifest

from .engine import GpuEngine, LoadEngine, Scratch
from .kernels import SkinnyGemm


class LoadedGemm:
    """One gemm: its kind's engine, its own weights, and what multiplies few rows in the engine's place."""

    def __init__(self, engine: GpuEngine, weight: cp.ndarray, skinny_gemm: SkinnyGemm | None = None):
        self.engine, self.weight, self.skinny_gemm = engine, weight, skinny_gemm

    def enqueue(self, x: cp.ndarray, y: cp.ndarray, stream: cp.cuda.Stream, context: int = 0) -> None:
        """Multiply: y = x @ weight, on `stream`, which is the current one, without waiting."""
        if self.skinny_gemm is not None and self.skinny_gemm.takes(x, self.weight):
            self.skinny_gemm.multiply(x, self.weight, y)
        else:
            self.engine.bind({"x": x, "weight": self.weight}, {"y": y}, context=context).enqueue(stream)


def load_arrays(directory: Path, manifest: Manifest, stack: StackName, names: Sequence[str]) -> list[cp.ndarray]:
    """Verified arrays of a stack, on the GPU.

    Raises:
        ManifestError: if one is missing or altered.
    """
    files = [array_file(stack, name) for name in names]
    manifest.verify(directory, tuple(files))
    return [cp.asarray(np.load(directory / file, allow_pickle=False)) for file in files]


def load_gemms(
    directory: Path,
    manifest: Manifest,
    stack: StackSizes,
    gemms: Sequence[Gemm],
    load: LoadEngine,
    scratch: Scratch,
    skinny_gemm: SkinnyGemm | None = None,
) -> dict[Gemm, LoadedGemm]:
    """Products of a stack with their weights on the GPU, in the order given; those of a kind share an engine, all share `skinny_gemm`.

    Raises:
        ManifestError: if a file is missing or altered.
        EngineError: if an engine cannot be loaded here.
    """
    manifest.verify(directory, tuple(gemm.weight for gemm in gemms))
    engines: dict[str, GpuEngine] = {}
    loaded = {}
    for gemm in gemms:
        if gemm.engine not in engines:
            tensors = gemm_tensors(stack, gemm, manifest.precision)
            engines[gemm.engine] = load(gemm.engine, tensors, scratch)
        weight = cp.asarray(np.load(directory / gemm.weight, allow_pickle=False))
        loaded[gemm] = LoadedGemm(engines[gemm.engine], weight, skinny_gemm)
    return loaded


def weight_bytes(gemms: Mapping[Gemm, LoadedGemm]) -> int:
    """Bytes of the weights, and of the engines that share them."""
    engines = {id(loaded.engine): loaded.engine for loaded in gemms.values()}
    return sum(loaded.weight.nbytes for loaded in gemms.values()) + sum(engine.weight_bytes for engine in engines.values())
