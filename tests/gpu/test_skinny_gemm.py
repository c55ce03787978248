"""The skinny GEMM against NumPy, with and without split-K; a row's result does not depend on the others."""

from __future__ import annotations

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.engines.gpu.kernels import MAX_K, MAX_TILES, TILE_ROWS, SkinnyGemm  # noqa: E402

pytestmark = pytest.mark.gpu
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
