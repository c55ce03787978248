"""The encoder's library kernels as they were exported, each against fp32: rows that no tile divides, outputs poisoned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

cp = pytest.importorskip("cupy")
pytest.importorskip("tvm_ffi")

from serving.contract.gemms import StackSizes  # noqa: E402
from serving.contract.library_kernels import (  # noqa: E402
    HOPPER,
    SUMMING_KINDS,
    EncoderKernel,
    EncoderLibrary,
    gemm_widths,
    inner_order,
    narrow_order,
    sum_tiles,
)
from serving.engines.gpu.library.layers import load_kernels  # noqa: E402
from tests.gpu.conftest import GpuReader  # noqa: E402
from tests.serving.engines.numpy_reader import (  # noqa: E402
    activate,
    narrowed,
    numbers,
)

pytestmark = pytest.mark.gpu
# Of the norm: what rounding once explains, in half precision, of sums by FP8's tensor cores, and of e4m3 (at worst 2^-4 / sqrt(3)).
HALF, FAST, NARROW = 5e-4, 2e-3, 3.7e-2


@pytest.fixture(scope="module")
def library(gpu_reader: GpuReader) -> tuple[EncoderLibrary, StackSizes, Path]:
    manifest = gpu_reader.manifest
    if manifest.encoder_library is None or manifest.encoder is None:
        pytest.skip("this reader's encoder is of engines")
    return manifest.encoder_library, manifest.encoder, gpu_reader.engines


def ordered(channels: int, order: tuple[int, ...]) -> np.ndarray:
    """The channel at each place."""
    places = np.arange(channels)
    return places - places % len(order) + np.array(order)[places % len(order)]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def run(launch: Any, kernel: EncoderKernel, stack: StackSizes, rows: int, rng: np.random.Generator) -> dict[str, float]:
    """Relative errors of everything that one GEMM writes."""
    given, made = gemm_widths(stack, kernel.kind)
    fp8, d_model = kernel.precision == "float8", stack.d_model
    x, weight = rng.standard_normal((rows, given)), rng.standard_normal((made, given))
    residual = (2 * rng.standard_normal((rows, d_model))).astype(np.float16)
    squares = rng.random((3, rows)).astype(np.float32) * d_model
    factors = (rng.random(d_model) * 8 + 4).astype(np.float32)
    alpha, beta = (given**-0.5, 30.0) if fp8 else (1.0, 1.0)
    if fp8:
        x, weight = narrowed(x), narrowed(weight)
        product = numbers(x) @ numbers(weight).T * alpha
    else:
        x, weight = x.astype(np.float16), (weight * given**-0.5).astype(np.float16)
        product = x.astype(np.float32) @ weight.astype(np.float32).T
    summing, gated = kernel.kind in SUMMING_KINDS, stack.gated and kernel.kind == "wi"
    narrow_out = fp8 and kernel.kind == "wi"
    columns = made // 2 if gated else made
    out = cp.full((rows, columns), 0x7F, cp.uint8) if narrow_out else cp.full((rows, columns), cp.nan, cp.float16)
    narrow = cp.full((rows, d_model), 0x7F, cp.uint8)
    tiles = sum_tiles(stack, kernel.tiling)
    sums = cp.full((tiles, rows), cp.nan, cp.float32)
    arrays = [cp.asarray(a) for a in (x, weight, residual, factors, squares)]
    addresses = [a.data.ptr for a in (arrays[0], arrays[1], out, arrays[2], narrow, arrays[3], arrays[4], sums)]
    clusters = cp.cuda.Device().attributes["MultiProcessorCount"] // kernel.tiling.cluster_size
    cp.cuda.Device().synchronize()
    launch(*addresses, alpha, beta, rows, len(squares), clusters, 0)
    cp.cuda.Device().synchronize()
    if summing:
        wanted = product + residual
        found = {"stream": error(out.get(), wanted), "squares": error(sums.get().sum(0), (wanted**2).sum(1))}
        if kernel.narrow:
            places = ordered(d_model, narrow_order(HOPPER))
            found["narrow"] = error(numbers(narrow.get()), (wanted * factors)[:, places].clip(-448, 448))
        return found
    wanted = product / np.sqrt(squares.sum(0) / d_model + stack.epsilon)[:, None]
    if kernel.kind == "wi":
        if gated:
            channels = np.argsort(ordered(stack.d_ff, inner_order(HOPPER, kernel.precision)))
            wanted = np.concatenate([wanted[:, ::2][:, channels], wanted[:, 1::2][:, channels]], axis=1)
        wanted = activate(wanted, stack) * beta
    return {
        "narrow" if narrow_out else "out": error(numbers(out.get()) if narrow_out else out.get(), wanted.clip(-448, 448) if fp8 else wanted)
    }


@pytest.mark.parametrize("rows", [1, 77, 1000])
def test_every_gemm_equals_fp32(library: tuple[EncoderLibrary, StackSizes, Path], rows: int, record_property: Any) -> None:
    described, stack, engines = library
    rng = np.random.default_rng(rows)
    for kernel, launch in load_kernels(engines, described).items():
        for what, found in run(launch, kernel, stack, rows, rng).items():
            record_property(f"{kernel.name} {what}, {rows} rows", float(f"{found:.3g}"))
            most = NARROW if what == "narrow" else FAST if kernel.precision == "float8" else HALF
            assert found < most, (kernel.name, what, rows, found)
