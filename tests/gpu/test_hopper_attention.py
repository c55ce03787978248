"""Hopper's attention kernel against NumPy, and the cards and sizes that it leaves to the kernel for all."""

from __future__ import annotations

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.contract.call_sizes import attention_tiles, max_tiles  # noqa: E402
from serving.contract.gemms import StackSizes  # noqa: E402
from serving.engines.gpu.hopper_attention import HopperAttention, attention_for  # noqa: E402
from tests.serving.engines.numpy_rows import attend_within_passages  # noqa: E402

pytestmark = pytest.mark.gpu
BASE, NARROW_HEADS = StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6), StackSizes(192, 4, 6, 6, 32, 384, True, 1e-6)


def halves(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float16)


hopper = pytest.mark.skipif(cp.cuda.Device().compute_capability != "90", reason="made for Hopper")


@hopper
@pytest.mark.parametrize("heads", [12, 1, 5, 16])
@pytest.mark.parametrize("scale", [0.125, 2.0])
def test_hopper_attention_stays_within_each_passage(heads: int, scale: float) -> None:
    stack = StackSizes(heads * 64, 12, heads, heads, 64, 2048, True, 1e-6)
    rng = np.random.default_rng()
    lengths = [256, 1, 128, 129, 63, 64, 65, 192, 193, 200, 17, 250, *rng.integers(1, 257, 40).tolist()]
    rows, width = sum(lengths), heads * 64
    made = halves(rng, rows + 200, 3 * width)  # rows behind the last that nobody may read
    made[:rows, :width] *= np.float16(scale)
    made[rows:] = np.nan
    bias = rng.standard_normal((257, heads)).astype(np.float32)
    out = cp.full((rows + 200, width), cp.nan, cp.float16)
    tiles = np.zeros((max_tiles(rows, len(lengths), HopperAttention.tile) + 3, 3), np.int32)  # as a captured call has them
    of_passages = attention_tiles(np.array(lengths), HopperAttention.tile)
    tiles[: len(of_passages)] = of_passages
    assert HopperAttention.serves(stack, 256) and not HopperAttention.serves(stack, 257)
    attend = HopperAttention(stack, 128)
    attend(cp.asarray(made), cp.asarray(tiles), 256, cp.asarray(bias), out)
    assert np.isnan(out[rows:].get()).all()
    wanted = attend_within_passages(made[:rows].astype(np.float32), lengths, bias, stack)
    assert np.abs(out[:rows].get() - wanted).max() < 4e-3 * np.abs(wanted).max()


@hopper
def test_what_is_no_number_stays_in_its_passage() -> None:
    stack = BASE
    rng = np.random.default_rng(4)
    lengths = [200, 130, 1, 256, 70, 3]
    made = halves(rng, sum(lengths), 3 * 768, scale=0.5)
    made[200:330] = np.nan  # the second passage, which lies behind the first and before the third
    bias = rng.standard_normal((257, 12)).astype(np.float32)
    out = cp.zeros((sum(lengths), 768), cp.float16)
    tiles = cp.asarray(attention_tiles(np.array(lengths), HopperAttention.tile))
    HopperAttention(stack, 128)(cp.asarray(made), tiles, 256, cp.asarray(bias), out)
    found = np.isnan(out.get()).any(1)
    assert found[200:330].all() and not found[:200].any() and not found[330:].any()


@hopper
def test_hopper_attention_writes_e4m3() -> None:
    stack, scale = BASE, 64.0
    rng = np.random.default_rng(3)
    made = halves(rng, 200 * 30, 3 * 768, scale=0.5)
    bias = rng.standard_normal((257, 12)).astype(np.float32)
    tiles = cp.asarray(attention_tiles(np.full(30, 200), HopperAttention.tile))
    half, byte = cp.full((6000, 768), cp.nan, cp.float16), cp.full((6000, 768), 0x7F, cp.uint8)
    HopperAttention(stack, 128)(cp.asarray(made), tiles, 200, cp.asarray(bias), half)
    HopperAttention(stack, 128, fp8=True)(cp.asarray(made), tiles, 200, cp.asarray(bias), byte, scale)
    wanted = half.get().astype(np.float64) * scale
    assert np.abs(wanted).max() < 448
    bits = byte.get().astype(np.int64)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    got = np.where(bits & 128, -size, size)
    assert (np.abs(got - wanted) <= np.maximum(np.abs(wanted) / 15, 1 / 512)).all()


def test_longer_passages_and_other_heads_get_the_kernel_for_all_cards() -> None:
    assert attention_for(BASE, 128, 257).tile < 257
    assert attention_for(NARROW_HEADS, 128, 256).tile < 256
