"""Every CUDA kernel against NumPy, for multi-head, grouped and multi-query sizes, with idle rows and slots in no order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.gpu_kernels import StepKernels, splits_of  # noqa: E402
from serving.tensors import EngineSizes  # noqa: E402

pytestmark = pytest.mark.gpu
CAPACITY, SLOTS, BATCH, REACH = 700, 6, 5, 20
LENGTHS = np.array([700, 1, 256, 0, 513], np.int32)
PLACES = np.array([4, 0, 5, 0, 2], np.int32)


def sizes_of(heads: int, kv_heads: int, d_kv: int) -> EngineSizes:
    return EngineSizes(16, 24, 2, (0, 1), heads, kv_heads, d_kv, 3072)


SIZES = [
    sizes_of(12, 12, 64),
    sizes_of(12, 1, 64),
    sizes_of(6, 6, 32),
    sizes_of(6, 1, 32),
    sizes_of(8, 2, 128),
    sizes_of(5, 1, 16),
    sizes_of(32, 1, 64),
]


@pytest.fixture(params=SIZES, ids=lambda s: f"{s.num_heads}x{s.num_kv_heads}x{s.d_kv}")
def sizes(request: pytest.FixtureRequest) -> EngineSizes:
    return request.param


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def reference(sizes: EngineSizes, query: np.ndarray, rows: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """[heads, d_kv], [tokens, 2 * kv_heads * d_kv], [tokens, heads] -> mixed [heads * d_kv], weights [heads, tokens]."""
    keys, values = rows.astype(np.float64).reshape(-1, 2, sizes.num_kv_heads, sizes.d_kv).transpose(1, 2, 0, 3)
    group = sizes.num_heads // sizes.num_kv_heads
    mixed, all_weights = [], []
    for head in range(sizes.num_heads):
        scores = keys[head // group] @ query[head].astype(np.float64) + (0 if bias is None else bias[:, head])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        all_weights.append(weights)
        mixed.append(weights @ values[head // group])
    return np.concatenate(mixed), np.array(all_weights)


@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_attention_and_evidence(sizes: EngineSizes, with_bias: bool) -> None:
    rng = np.random.default_rng(0)
    heads, d_kv = sizes.num_heads, sizes.d_kv
    cache = normal(rng, SLOTS, CAPACITY, 2 * sizes.num_kv_heads * d_kv).astype(np.float16)
    cache[1] = np.nan  # a slot that nobody may read
    query = (normal(rng, BATCH, heads * d_kv) * d_kv**-0.5).astype(np.float16)
    positions = np.array([0, 0, 7, -1, 0], np.int32)
    bias = normal(rng, REACH + 1, heads) if with_bias else None
    encoder_positions = rng.integers(0, 30, (SLOTS, CAPACITY)).astype(np.int32)
    kernels = StepKernels(sizes, 1)
    arrays = (query, cache, PLACES, LENGTHS, positions, bias, encoder_positions)
    at: Any = tuple(None if a is None else cp.asarray(a) for a in arrays)
    partial = cp.full((BATCH, heads, splits_of(CAPACITY), d_kv + 2), cp.nan, cp.float32)
    softmax, out = cp.empty((BATCH, heads, 2), cp.float32), cp.full((BATCH, heads * d_kv), cp.nan, cp.float16)
    weights = cp.full((BATCH, CAPACITY), cp.nan, cp.float32)
    kernels.cross_attention(*at, partial, softmax, out)  # type: ignore[call-arg]
    kernels.evidence(*at, softmax, 0, weights)  # type: ignore[call-arg]
    kernels.evidence(*at, softmax, 1, weights)  # type: ignore[call-arg]  # both layers the same here: the mean is one layer's
    out, weights = out.get(), weights.get()
    for row, (length, place) in enumerate(zip(LENGTHS, PLACES, strict=True)):
        if not length:
            assert not out[row].any()
            continue
        behind = np.clip(positions[row] - encoder_positions[place, :length], 0, REACH)
        mixed, wanted = reference(sizes, query[row].reshape(heads, d_kv), cache[place, :length], None if bias is None else bias[behind])
        assert np.abs(out[row] - mixed).max() < 2e-3 * np.abs(mixed).max()  # what rounding to half leaves
        if positions[row] == 0:
            np.testing.assert_allclose(weights[row, :length], wanted.sum(0), atol=2e-5, rtol=1e-4)
        else:
            assert np.isnan(weights[row]).all()


def test_self_attention(sizes: EngineSizes) -> None:
    rng = np.random.default_rng(1)
    heads, kv_heads, d_kv, capacity = sizes.num_heads, sizes.num_kv_heads, sizes.d_kv, 64
    cache = normal(rng, SLOTS, capacity, 2 * kv_heads * d_kv).astype(np.float16)
    made = normal(rng, BATCH, (heads + 2 * kv_heads) * d_kv).astype(np.float16)
    made[:, : heads * d_kv] *= np.float16(d_kv**-0.5)
    positions = np.array([0, 63, 17, -1, 40], np.int32)
    bias = normal(rng, REACH + 1, heads)
    on_gpu, out = cp.asarray(cache), cp.full((BATCH, heads * d_kv), cp.nan, cp.float16)
    StepKernels(sizes, 1).self_attention(cp.asarray(made), on_gpu, cp.asarray(PLACES), cp.asarray(positions), cp.asarray(bias), out)
    after, out = on_gpu.get(), out.get()
    expected = cache.copy()
    for row, (position, place) in enumerate(zip(positions, PLACES, strict=True)):
        if position < 0:
            assert not out[row].any()
            continue
        expected[place, position] = made[row, heads * d_kv :]
        behind = np.minimum(position - np.arange(position + 1), REACH)
        query = made[row, : heads * d_kv].reshape(heads, d_kv)
        mixed, _ = reference(sizes, query, expected[place, : position + 1], bias[behind])
        np.testing.assert_allclose(out[row], mixed, atol=2e-5, rtol=6e-4)  # what rounding to half leaves
    np.testing.assert_array_equal(after, expected)


def test_pick_token() -> None:
    rng = np.random.default_rng(2)
    sizes = SIZES[0]
    logits = normal(rng, BATCH, sizes.vocab_size) * 3
    logits[0, 1] = 50.0  # the end token, which row 0 may not pick
    logits[1, 1] = 50.0
    logits[2, [5, 900]] = 40.0  # equals: the lower id
    penalty = np.array([-1e9, 0, 0, 0, 0], np.float32)
    token, log_prob = cp.empty(BATCH, cp.int32), cp.empty(BATCH, cp.float32)
    StepKernels(sizes, 1).pick_token(cp.asarray(logits), cp.asarray(penalty), token, log_prob)
    wide = logits.astype(np.float64)
    wide[:, 1] += penalty
    wanted = wide.argmax(1)
    np.testing.assert_array_equal(token.get(), wanted)
    log_sums = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(log_prob.get(), -log_sums, atol=2e-5)
