"""Every CUDA kernel against NumPy, for multi-head, grouped and multi-query sizes, with idle rows and slots in no order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.contract.tensors import EngineSizes  # noqa: E402
from serving.engines.gpu.kernels import MAX_K, MAX_TILES, TILE_ROWS, HeadKernels, SkinnyGemm, StepKernels  # noqa: E402
from tests.serving.engines.numpy_reader import (  # noqa: E402
    as_splits,
    narrowed,
    numbers,
)

pytestmark = pytest.mark.gpu
CAPACITY, SLOTS, BATCH, MAX_RELATIVE_DISTANCE = 700, 6, 5, 20
LENGTHS = np.array([700, 1, 256, 0, 513], np.int32)
ROW_SLOTS = np.array([4, 0, 5, 0, 2], np.int32)


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
    """[heads, d_kv], [tokens, 2 * kv_heads * d_kv], [tokens, heads] -> attended [heads * d_kv], weights [heads, tokens]."""
    keys, values = rows.astype(np.float64).reshape(-1, 2, sizes.num_kv_heads, sizes.d_kv).transpose(1, 2, 0, 3)
    group = sizes.num_heads // sizes.num_kv_heads
    attended, all_weights = [], []
    for head in range(sizes.num_heads):
        scores = keys[head // group] @ query[head].astype(np.float64) + (0 if bias is None else bias[:, head])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        all_weights.append(weights)
        attended.append(weights @ values[head // group])
    return np.concatenate(attended), np.array(all_weights)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_cross_attention_and_attribution(sizes: EngineSizes, fp8: bool, with_bias: bool) -> None:
    if fp8 and sizes.num_kv_heads < sizes.num_heads:
        pytest.skip("shared keys stay in half precision")
    rng = np.random.default_rng(0)
    heads, d_kv = sizes.num_heads, sizes.d_kv
    cache = normal(rng, SLOTS, CAPACITY, 2 * sizes.num_kv_heads * d_kv).astype(np.float16)
    cache[1] = np.nan  # a slot that no row uses
    query = (normal(rng, BATCH, heads * d_kv) * d_kv**-0.5).astype(np.float16)
    positions = np.array([0, 0, 7, -1, 0], np.int32)
    bias = normal(rng, MAX_RELATIVE_DISTANCE + 1, heads) if with_bias else None
    encoder_positions = rng.integers(0, 30, (SLOTS, CAPACITY)).astype(np.int32)
    kernels = StepKernels(sizes, cross_fp8=fp8)
    scales = None
    if fp8:  # rounded by the kernel, slot by slot; the reference reads what it wrote
        of_layers = (rng.random((2, 2, heads)) * 0.02 + 0.005).astype(np.float32)
        halves = np.stack([np.zeros_like(cache), cache])
        narrow = cp.full((2, SLOTS, 2, heads, CAPACITY, d_kv), 0x7F, cp.uint8)
        for row, slot in enumerate(ROW_SLOTS):
            source = cp.asarray(halves[:, slot])
            kernels.quantize_cross_kv(source, cp.asarray(of_layers), int(LENGTHS[row]), narrow, int(slot))
        scales, factors = of_layers[1], of_layers[1].repeat(d_kv, 1).ravel()
        written = narrow.get().transpose(0, 1, 4, 2, 3, 5).reshape(2, SLOTS, CAPACITY, -1)  # token by token
        assert (written[:, 3] == 0x7F).all() and (written[:, 2, 513:] == 0x7F).all() and not (written[0, 4] & 0x7F).any()
        wanted_bytes = narrowed(cache[4].astype(np.float32) / factors)
        assert (written[1, 4] != wanted_bytes).mean() < 1e-3  # a tie may fall either way: its reciprocal is rounded
        assert np.abs(numbers(written[1, 4]) - numbers(wanted_bytes)).max() <= 32  # by one step of the largest numbers
        cache = numbers(written[1]) * factors
        on_gpu = narrow[1]
    else:
        on_gpu = cp.asarray(cache)
    arrays = (query, on_gpu, scales, ROW_SLOTS, LENGTHS, positions, bias, encoder_positions)
    inputs: Any = tuple(None if a is None else cp.asarray(a) for a in arrays)
    partial = cp.full((BATCH, heads, kernels.max_splits(CAPACITY), d_kv + 2), cp.nan, cp.float32)
    softmax, out = cp.empty((BATCH, heads, 2), cp.float32), cp.full((BATCH, heads * d_kv), cp.nan, cp.float16)
    weights = cp.full((BATCH, CAPACITY), cp.nan, cp.float32)
    kernels.cross_attention(*inputs, partial, softmax, out)  # type: ignore[call-arg]
    kernels.attribution(*inputs, softmax, 0, weights)  # type: ignore[call-arg]
    kernels.attribution(*inputs, softmax, 1, weights)  # type: ignore[call-arg]  # both layers the same here: the mean is one layer's
    out, weights = out.get(), weights.get()
    for row, (length, slot) in enumerate(zip(LENGTHS, ROW_SLOTS, strict=True)):
        if not length:
            assert not out[row].any()
            continue
        distance = np.clip(positions[row] - encoder_positions[slot, :length], 0, MAX_RELATIVE_DISTANCE)
        attended, wanted = reference(sizes, query[row].reshape(heads, d_kv), cache[slot, :length], None if bias is None else bias[distance])
        assert np.abs(out[row] - attended).max() < 2e-3 * np.abs(attended).max()  # what rounding to half leaves
        if positions[row] == 0:
            np.testing.assert_allclose(weights[row, :length], wanted.sum(0), atol=2e-5, rtol=1e-2 if fp8 else 1e-4)
        else:
            assert np.isnan(weights[row]).all()


def split(array: np.ndarray, k_splits: int, rng: np.random.Generator) -> np.ndarray:
    """float16 k_splits whose sum is about `array`."""
    shares = rng.dirichlet(np.ones(k_splits), array.shape).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(shares * array[..., None], -1, 0)).astype(np.float16)


@pytest.mark.parametrize("k_splits", [1, 2, 4])
def test_self_attention(sizes: EngineSizes, k_splits: int) -> None:
    rng = np.random.default_rng(1)
    heads, kv_heads, d_kv, capacity = sizes.num_heads, sizes.num_kv_heads, sizes.d_kv, 300
    if heads * d_kv // k_splits % 8:
        pytest.skip("k_splits are whole vectors")
    cache = normal(rng, SLOTS, capacity, 2 * kv_heads * d_kv).astype(np.float16)
    qkv = normal(rng, BATCH, (heads + 2 * kv_heads) * d_kv)
    qkv[:, : heads * d_kv] *= d_kv**-0.5
    in_splits = split(qkv, k_splits, rng)
    qkv = in_splits.astype(np.float32).sum(0)
    positions = np.array([0, 299, 17, -1, 140], np.int32)
    bias = normal(rng, MAX_RELATIVE_DISTANCE + 1, heads)
    on_gpu, out = cp.asarray(cache), cp.full((BATCH, heads * d_kv), cp.nan, cp.float16)
    out = out if k_splits == 1 else out.reshape(k_splits, BATCH, -1)
    inputs = (
        cp.asarray(in_splits if k_splits > 1 else in_splits[0]),
        on_gpu,
        cp.asarray(ROW_SLOTS),
        cp.asarray(positions),
        cp.asarray(bias),
    )
    StepKernels(sizes).self_attention(*inputs, out)
    after, out = on_gpu.get(), out.get()
    expected, wanted = cache.copy(), np.zeros((BATCH, heads * d_kv))
    for row, (position, slot) in enumerate(zip(positions, ROW_SLOTS, strict=True)):
        if position < 0:
            continue
        expected[slot, position] = qkv[row, heads * d_kv :]
        distance = np.minimum(position - np.arange(position + 1), MAX_RELATIVE_DISTANCE)
        query = qkv[row, : heads * d_kv].reshape(heads, d_kv)
        wanted[row], _ = reference(sizes, query, expected[slot, : position + 1], bias[distance])
    np.testing.assert_allclose(out, as_splits(wanted, k_splits), atol=2e-5, rtol=6e-4)  # what rounding to half leaves
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("k_splits", [2, 4])
def test_split_output_of_cross_attention_equals_the_whole(k_splits: int) -> None:
    rng = np.random.default_rng(4)
    sizes = sizes_of(12, 1, 64)
    kernels, batch, capacity = StepKernels(sizes), 48, 3000
    cache = cp.asarray(normal(rng, batch, capacity, 2 * sizes.d_kv).astype(np.float16))
    query = cp.asarray((normal(rng, batch, 12 * sizes.d_kv) * 0.1).astype(np.float16))
    lengths = rng.integers(1, capacity + 1, batch).astype(np.int32)
    numbers = [cp.asarray(a) for a in (rng.permutation(batch).astype(np.int32), lengths, np.zeros(batch, np.int32))]
    slots, of_rows, positions = numbers
    found = []
    for rows in (batch, 1):  # many rows have long chunks, one alone has short ones
        for count in (1, k_splits):
            out = cp.full((rows, 12 * sizes.d_kv), cp.nan, cp.float16)
            out = out if count == 1 else out.reshape(count, rows, -1)
            partial = cp.full((rows, 12, kernels.max_splits(capacity), sizes.d_kv + 2), cp.nan, cp.float32)
            inputs = (query[:rows], cache, None, slots[:rows], of_rows[:rows], positions[:rows], None, cp.zeros((batch, 1), cp.int32))
            kernels.cross_attention(*inputs, partial, cp.empty((rows, 12, 2), cp.float32), out)
            found.append(out.get())
    np.testing.assert_array_equal(found[1], as_splits(found[0], k_splits))
    np.testing.assert_array_equal(found[3], as_splits(found[2], k_splits))
    assert kernels.chunk_of(batch, capacity) > kernels.chunk_of(1, capacity)
    for rows in range(1, 200):  # blocks of one wave
        assert rows * -(-10_240 // kernels.chunk_of(rows, 10_240)) <= 396
    np.testing.assert_allclose(found[2][0], found[0][0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("batch", "d_model", "vocab"), [(5, 768, 32128), (1, 64, 3072), (48, 24, 3070), (100, 1032, 257)])
def test_greedy_choice(batch: int, d_model: int, vocab: int) -> None:
    rng = np.random.default_rng(2)
    hidden, head = (normal(rng, n, d_model).astype(np.float16) for n in (batch, vocab))
    head[5] = head[200]  # equals: the lower id
    hidden[0] = 3 * head[200]
    hidden[-1] = 3 * head[1]  # the end token, which the last row may not pick
    if batch > 2:
        hidden[1] = np.nan  # no choice, but a token that the table has
    penalty = np.zeros(batch, np.float32)
    penalty[-1] = -1e9
    kernels, (token, log_prob) = HeadKernels(d_model, vocab, 1), (cp.full(batch, -7, cp.int32), cp.full(batch, cp.nan, cp.float32))
    kernels.combine_argmax(cp.asarray(hidden), cp.asarray(head), cp.asarray(penalty), kernels.scratch(batch), token, log_prob)
    wide = hidden.astype(np.float64) @ head.astype(np.float64).T
    wide[:, 1] += penalty
    picked, found = token.get(), log_prob.get()
    assert batch == 1 or picked[0] == 5
    assert picked[-1] != 1 and ((picked >= 0) & (picked < vocab)).all()
    fine = np.flatnonzero(np.isfinite(wide).all(1))
    largest = wide[fine].max(1)
    np.testing.assert_allclose(wide[fine, picked[fine]], largest, rtol=2e-6)  # sums in fp32: near-ties may fall either way
    log_sums = np.log(np.exp(wide[fine] - largest[:, None]).sum(1))
    np.testing.assert_allclose(found[fine], -log_sums, atol=2e-3 if d_model > 100 else 1e-4)


# The skinny GEMM against NumPy, with and without split-K; a row's result does not depend on the others.

MAX_ROWS = TILE_ROWS * MAX_TILES
# k_splits, input features of a split, output features
SHAPES = [(1, 768, 4096), (4, 192, 768), (4, 512, 768), (4, 192, 896), (1, 32, 32), (2, 352, 64), (1, MAX_K, 160)]


def operands(k_splits: int, rows: int, in_features: int, out_features: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    shapes = (k_splits, rows, in_features), (k_splits, in_features, out_features)
    x, weight = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    return (x, weight) if k_splits > 1 else (x[0], weight[0])


@pytest.mark.parametrize("rows", [1, 7, 8, 16, 17, 24, 32, 33, MAX_ROWS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_as_numpy_multiplies(shape: tuple[int, int, int], rows: int) -> None:
    k_splits, in_features, out_features = shape
    x, weight = operands(k_splits, rows, in_features, out_features)
    skinny = SkinnyGemm()
    size = k_splits * rows * out_features
    memory = cp.full(size + TILE_ROWS * out_features, cp.nan, cp.float16)  # room beyond the result, to see rows that are written too far
    out, beyond = memory[:size].reshape(*x.shape[:-1], out_features), memory[size:]
    assert skinny.takes(cp.asarray(x), cp.asarray(weight))
    skinny.multiply(cp.asarray(x), cp.asarray(weight), out)
    wanted = x.astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(out.get(), wanted, rtol=6e-4, atol=2e-3)  # what rounding to half leaves, and sums in fp32 near zero
    assert np.isnan(beyond.get()).all()


def test_a_row_is_the_same_alone_and_with_others() -> None:
    x, weight = operands(4, MAX_ROWS, 192, 768)
    skinny, found = SkinnyGemm(), {}
    for rows in (MAX_ROWS, 24, 1):
        out = cp.empty((4, rows, 768), cp.float16)
        skinny.multiply(cp.asarray(np.ascontiguousarray(x[:, :rows])), cp.asarray(weight), out)
        found[rows] = out.get()
    np.testing.assert_array_equal(found[24], found[MAX_ROWS][:, :24])
    np.testing.assert_array_equal(found[1], found[MAX_ROWS][:, :1])


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "dtype"),
    [
        (MAX_ROWS + 1, 64, 64, "float16"),
        (1, MAX_K + 32, 64, "float16"),
        (1, 48, 64, "float16"),
        (1, 64, 48, "float16"),
        (1, 64, 64, "uint16"),
    ],
)
def test_shapes_and_dtypes_that_it_leaves_to_the_engine(rows: int, in_features: int, out_features: int, dtype: str) -> None:
    assert not SkinnyGemm().takes(cp.empty((rows, in_features), cp.float16), cp.empty((in_features, out_features), dtype))
