"""The CUDA kernels for rows and the encoder's attention against NumPy: passages of all lengths, heads of all widths, both activations."""

from __future__ import annotations

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.contract.call_sizes import attention_tiles, max_tiles  # noqa: E402
from serving.contract.gemms import StackSizes  # noqa: E402
from serving.engines.gpu.hopper_attention import HopperAttention, attention_for  # noqa: E402
from serving.engines.gpu.kernels import EncoderAttention, RowKernels  # noqa: E402
from tests.serving.engines.numpy_reader import activate, attend_within_passages, norm  # noqa: E402

pytestmark = pytest.mark.gpu
SIZES = [
    StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6),
    StackSizes(192, 4, 6, 6, 32, 384, True, 1e-6),
    StackSizes(1032, 1, 5, 5, 128, 512, False, 1e-3),
    StackSizes(24, 1, 3, 3, 16, 40, False, 1e-12),
]
MAX_DISTANCES = [128, 128, 20, 7]
LENGTHS = [256, 1, 128, 129, 63, 64, 65, 200, 17, 512, 250]


@pytest.fixture(params=SIZES, ids=lambda s: f"{s.d_model}-{s.num_heads}x{s.d_kv}-{s.d_ff}")
def stack(request: pytest.FixtureRequest) -> StackSizes:
    return request.param


def halves(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float16)


def test_attention_stays_within_each_passage(stack: StackSizes) -> None:
    rng = np.random.default_rng(0)
    rows, width = sum(LENGTHS), stack.num_heads * stack.d_kv
    gemm_output = halves(rng, rows + 3, 3 * width)  # rows beyond the last, which must not be read
    gemm_output[:rows, :width] *= np.float16(stack.d_kv**-0.5)
    gemm_output[rows:] = np.nan
    max_relative_distance = MAX_DISTANCES[SIZES.index(stack)]
    bias = rng.standard_normal((2 * max_relative_distance + 1, stack.num_heads)).astype(np.float32)
    out = cp.full((rows, width), cp.nan, cp.float16)
    tiles = cp.asarray(attention_tiles(np.array(LENGTHS)))
    EncoderAttention(stack, max_relative_distance, max(LENGTHS))(cp.asarray(gemm_output), tiles, max(LENGTHS), cp.asarray(bias), out)
    wanted = attend_within_passages(gemm_output[:rows].astype(np.float64), LENGTHS, bias, stack)
    assert np.abs(out.get() - wanted).max() < 4e-3 * np.abs(wanted).max()


def test_large_scores_do_not_overflow() -> None:
    stack = SIZES[0]
    rng = np.random.default_rng(1)
    gemm_output = halves(rng, 300, 3 * 768, scale=20.0)
    bias = rng.standard_normal((257, 12)).astype(np.float32) * 30
    out = cp.full((300, 768), cp.nan, cp.float16)
    tiles = cp.asarray(attention_tiles(np.array([100, 200])))
    EncoderAttention(stack, 128, 200)(cp.asarray(gemm_output), tiles, 200, cp.asarray(bias), out)
    wanted = attend_within_passages(gemm_output.astype(np.float64), [100, 200], bias, stack)
    assert np.abs(out.get() - wanted).max() < 4e-3 * np.abs(wanted).max()


def test_embedding_and_norms(stack: StackSizes) -> None:
    rng = np.random.default_rng(2)
    rows = 77
    kernels = RowKernels(stack)
    embedding, gemm_output = halves(rng, 50, stack.d_model), halves(rng, rows, stack.d_model)
    weights = rng.standard_normal((2, stack.d_model)).astype(np.float32)
    tokens = rng.integers(0, 50, rows).astype(np.int32)
    residual, normed = cp.full((rows, stack.d_model), cp.nan, cp.float32), cp.full((rows, stack.d_model), cp.nan, cp.float16)
    kernels.embed(cp.asarray(tokens), cp.asarray(embedding), cp.asarray(weights[0]), residual, normed)
    stream = embedding[tokens].astype(np.float32)
    np.testing.assert_array_equal(residual.get(), stream)
    np.testing.assert_allclose(normed.get(), norm(stream.astype(np.float64), weights[0], stack.epsilon), rtol=2e-3, atol=1e-5)
    kernels.add_and_norm(cp.asarray(gemm_output), cp.asarray(weights[1]), residual, normed)
    stream = stream + gemm_output
    np.testing.assert_array_equal(residual.get(), stream)
    wanted = norm(stream.astype(np.float64), weights[1], stack.epsilon)
    np.testing.assert_allclose(normed.get(), wanted, rtol=2e-3, atol=1e-5)
    # the last one: to other rows, and the residual stream stays
    destinations = rng.permutation(100)[:rows].astype(np.int32)
    hidden = cp.zeros((100, stack.d_model), cp.float16)
    kernels.add_and_norm(cp.asarray(gemm_output), cp.asarray(weights[0]), residual, hidden, cp.asarray(destinations))
    np.testing.assert_array_equal(residual.get(), stream)
    wanted = np.zeros((100, stack.d_model))
    wanted[destinations] = norm((stream + gemm_output).astype(np.float64), weights[0], stack.epsilon)
    np.testing.assert_allclose(hidden.get(), wanted, rtol=2e-3, atol=1e-5)


def test_activation(stack: StackSizes) -> None:
    rng = np.random.default_rng(3)
    inner = halves(rng, 61, stack.d_ff * (2 if stack.gated else 1), scale=4.0)
    inner[0, :8] = [-60000, 60000, -30, 30, 0, -0.01, 11, -11]
    if stack.gated:
        inner[0, stack.d_ff : stack.d_ff + 8] = 1
    out = cp.full((61, stack.d_ff), cp.nan, cp.float16)
    RowKernels(stack).activate(cp.asarray(inner), out)
    np.testing.assert_allclose(out.get(), activate(inner.astype(np.float64), stack), rtol=2e-3, atol=1e-5)


# Hopper's attention kernel against NumPy, and the cards and sizes that it leaves to the kernel for all.

BASE, NARROW_HEADS = StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6), StackSizes(192, 4, 6, 6, 32, 384, True, 1e-6)


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
