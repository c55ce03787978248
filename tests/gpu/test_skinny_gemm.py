"""The gemm of a step's few rows against NumPy: shapes whole and in k_splits, and every row as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.engines.gpu.kernels import MAX_K, MAX_TILES, TILE_ROWS, SkinnyGemm  # noqa: E402

pytestmark = pytest.mark.gpu
MOST_ROWS = TILE_ROWS * MAX_TILES
# k_splits, columns of a part that go in, columns that come out
SHAPES = [(1, 768, 4096), (4, 192, 768), (4, 512, 768), (4, 192, 896), (1, 32, 32), (2, 352, 64), (1, MAX_K, 160)]


def operands(k_splits: int, rows: int, given: int, made: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    shapes = (k_splits, rows, given), (k_splits, given, made)
    x, weight = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    return (x, weight) if k_splits > 1 else (x[0], weight[0])


@pytest.mark.parametrize("rows", [1, 7, 8, 16, 17, 24, 32, 33, MOST_ROWS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_as_numpy_multiplies(shape: tuple[int, int, int], rows: int) -> None:
    k_splits, given, made = shape
    x, weight = operands(k_splits, rows, given, made)
    few = SkinnyGemm()
    size = k_splits * rows * made
    memory = cp.full(size + TILE_ROWS * made, cp.nan, cp.float16)  # behind the result there is room for rows too many
    out, behind = memory[:size].reshape(*x.shape[:-1], made), memory[size:]
    assert few.takes(cp.asarray(x), cp.asarray(weight))
    few.multiply(cp.asarray(x), cp.asarray(weight), out)
    wanted = x.astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(out.get(), wanted, rtol=6e-4, atol=2e-3)  # what rounding to half leaves, and sums in fp32 near zero
    assert np.isnan(behind.get()).all()


def test_a_row_is_the_same_alone_and_among_others() -> None:
    x, weight = operands(4, MOST_ROWS, 192, 768)
    few, found = SkinnyGemm(), {}
    for rows in (MOST_ROWS, 24, 1):
        out = cp.empty((4, rows, 768), cp.float16)
        few.multiply(cp.asarray(np.ascontiguousarray(x[:, :rows])), cp.asarray(weight), out)
        found[rows] = out.get()
    np.testing.assert_array_equal(found[24], found[MOST_ROWS][:, :24])
    np.testing.assert_array_equal(found[1], found[MOST_ROWS][:, :1])


@pytest.mark.parametrize(
    ("rows", "given", "made", "dtype"),
    [
        (MOST_ROWS + 1, 64, 64, "float16"),
        (1, MAX_K + 32, 64, "float16"),
        (1, 48, 64, "float16"),
        (1, 64, 48, "float16"),
        (1, 64, 64, "uint16"),
    ],
)
def test_what_it_does_not_take(rows: int, given: int, made: int, dtype: str) -> None:
    assert not SkinnyGemm().takes(cp.empty((rows, given), cp.float16), cp.empty((given, made), dtype))
