"""Programmatic dependent launch: a kernel that starts early must wait before it reads what earlier kernels write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

from serving.contract.gemms import StackSizes  # noqa: E402
from serving.contract.tensors import EngineSizes  # noqa: E402
from serving.engines.gpu.cuda_graph import DEPENDENT_KERNELS, CudaGraph, supports_dependent_launch  # noqa: E402
from serving.engines.gpu.kernels import HeadKernels, RowKernels, SkinnyGemm, StepKernels  # noqa: E402

pytestmark = pytest.mark.gpu
ROWS, HEADS, D_KV, CAPACITY, VOCAB = 5, 12, 64, 700, 3072
WIDTH = HEADS * D_KV
STACK = StackSizes(WIDTH, 1, HEADS, HEADS, D_KV, 2048, True, 1e-6)

LATE = cp.RawKernel(
    """extern "C" __global__ void late(const int* from, int* to, int count) {
        for (long long start = clock64(); clock64() - start < 200000;) {}
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) to[i] = from[i];
    }""",
    "late",
)
HASTY = cp.RawKernel(
    """extern "C" __global__ void activate(const int* from, int* to, int count) {
        for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
    }""",
    "activate",
)


def halves(seed: int, *shape: int) -> Any:
    return cp.asarray((np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float16))


class Case:
    """A kernel, its input `source`, which the kernel before it writes, and its results."""

    def __init__(self, source: Any, results: tuple[Any, ...], run: Callable[[Any], None], kernels: int = 1):
        self.source, self.results, self.run, self.kernels = source, results, run, kernels


def row_case(name: str) -> Case:
    rows = RowKernels(STACK)
    if name == "activate":
        out = cp.empty((ROWS, STACK.d_ff), cp.float16)
        return Case(halves(1, ROWS, 2 * STACK.d_ff), (out,), lambda source: rows.activate(source, out))
    weight, residual, normed = cp.ones(WIDTH, cp.float32), cp.zeros((ROWS, WIDTH), cp.float32), cp.empty((ROWS, WIDTH), cp.float16)
    return Case(halves(1, ROWS, WIDTH), (residual, normed), lambda source: rows.add_and_norm(source, weight, residual, normed))


def step_case(name: str, kv_heads: int) -> Case:
    kernels = StepKernels(EngineSizes(16, WIDTH, 2, (0, 1), HEADS, kv_heads, D_KV, VOCAB))
    cache, slots = halves(2, ROWS, CAPACITY, 2 * kv_heads * D_KV), cp.arange(ROWS, dtype=cp.int32)
    positions = cp.asarray(np.array([0, 1, 70, -1, 300] if name == "self_attention" else [0] * ROWS, np.int32))
    out = cp.empty((ROWS, WIDTH), cp.float16)
    if name == "self_attention":
        bias = cp.zeros((20, HEADS), cp.float32)
        source = halves(1, ROWS, (HEADS + 2 * kv_heads) * D_KV)
        return Case(source, (out, cache), lambda source: kernels.self_attention(source, cache, slots, positions, bias, out))
    lengths = cp.asarray(np.array([700, 1, 256, 0, 513], np.int32))
    partial = cp.empty((ROWS, HEADS, kernels.max_splits(CAPACITY), D_KV + 2), cp.float32)
    softmax, weights = cp.empty((ROWS, HEADS, 2), cp.float32), cp.zeros((ROWS, CAPACITY), cp.float32)
    places = cp.zeros((ROWS, 1), cp.int32)

    def run(source: Any) -> None:
        at = (source, cache, None, slots, lengths, positions, None, places)
        kernels.cross_attention(*at, partial, softmax, out)
        kernels.attribution(*at, softmax, 0, weights)

    return Case(halves(1, ROWS, WIDTH), (out, softmax, weights), run, kernels=3)


def head_case() -> Case:
    kernels, head, penalty = HeadKernels(WIDTH, VOCAB, 1), halves(3, VOCAB, WIDTH), cp.zeros(ROWS, cp.float32)
    found, token, log_prob = kernels.scratch(ROWS), cp.empty(ROWS, cp.int32), cp.empty(ROWS, cp.float32)
    run = lambda source: kernels.combine_argmax(source, head, penalty, found, token, log_prob)  # noqa: E731
    return Case(halves(1, ROWS, WIDTH), (token, log_prob), run, kernels=2)


def product_case() -> Case:
    skinny, weight, out = SkinnyGemm(), halves(4, 4, WIDTH // 4, WIDTH), cp.empty((4, ROWS, WIDTH), cp.float16)
    return Case(halves(1, 4, ROWS, WIDTH // 4), (out,), lambda source: skinny.multiply(source, weight, out))


CASES: dict[str, Callable[[], Case]] = {
    "activate": lambda: row_case("activate"),
    "add_and_norm": lambda: row_case("add_and_norm"),
    "skinny_gemm": product_case,
    "self_attention, 1 key head": lambda: step_case("self_attention", 1),
    "self_attention, 12 key heads": lambda: step_case("self_attention", 12),
    "cross_attention, combine_split_kv and attribution, 1 key head": lambda: step_case("cross_attention", 1),
    "cross_attention, combine_split_kv and attribution, 12 key heads": lambda: step_case("cross_attention", 12),
    "head_argmax and combine_argmax": head_case,
}


def late_then(run: Callable[[Any], None], source: Any, stale: Any) -> Callable[[], None]:
    """Write `source` over `stale` after a while, and run on that."""

    def program() -> None:
        LATE((8,), (128,), (source, stale, np.int32(source.nbytes // 4)))
        run(stale)

    return program


@pytest.fixture
def stream() -> Any:
    if not supports_dependent_launch():
        pytest.skip("kernels cannot wait for the one before on this GPU or driver")
    return cp.cuda.Stream(non_blocking=True)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_waits_for_the_one_before_it(name: str, stream: Any) -> None:
    with stream:
        case = CASES[name]()
        case.run(case.source)
        wanted = [result.copy() for result in case.results]
        stale = cp.full(case.source.shape, 7, cp.float16)
        graph = CudaGraph(stream, late_then(case.run, case.source, stale))
        for _ in range(3):
            stale.fill(7)
            for result in case.results[: -1 if "self" in name else None]:  # the cache is read as well
                result.fill(0)
            graph.launch(stream)
            for result, want in zip(case.results, wanted, strict=True):
                np.testing.assert_array_equal(result.get(), want.get())
    assert graph.dependent_launches == case.kernels


def test_a_kernel_waits_for_all_earlier_ones(stream: Any) -> None:
    """Several kernels may run at once: the residual stream was written some kernels ago."""
    with stream:
        skinny, rows, weight = SkinnyGemm(), RowKernels(STACK), halves(4, WIDTH, WIDTH)
        source, norm, normed = halves(1, ROWS, WIDTH), cp.ones(WIDTH, cp.float32), cp.empty((ROWS, WIDTH), cp.float16)
        results, written = cp.empty((2, ROWS, WIDTH), cp.float16), cp.asarray(halves(2, ROWS, WIDTH), cp.float32)
        residual = written.copy()

        def following() -> None:
            skinny.multiply(source, weight, results[0])
            skinny.multiply(source, weight, results[1])
            rows.add_and_norm(results[1], norm, residual, normed)

        following()
        wanted = residual.get()
        graph = CudaGraph(stream, late_then(lambda _: following(), written, residual))
        for _ in range(3):
            residual.fill(7)
            graph.launch(stream)
            np.testing.assert_array_equal(residual.get(), wanted)
    assert graph.dependent_launches == 3


def test_a_kernel_that_does_not_wait_reads_too_early(stream: Any) -> None:
    """Therefore the tests above would notice a kernel that does not wait."""
    with stream:
        source, stale, out = (cp.full(64, value, cp.int32) for value in (1, 7, 0))
        count = np.int32(len(source))
        HASTY((1,), (64,), (source, out, count))
        graph = CudaGraph(stream, late_then(lambda x: HASTY((1,), (64,), (x, out, count)), source, stale))
        graph.launch(stream)
        assert (out.get() == 7).all()
        assert "activate" in DEPENDENT_KERNELS


def test_kernels_of_others_start_after_the_one_before_has_ended(stream: Any) -> None:
    with stream:
        source, stale, out = (cp.full(64, value, cp.int32) for value in (1, 7, 0))
        cp.copyto(out, source)
        graph = CudaGraph(stream, late_then(lambda x: cp.copyto(out, x), source, stale))
        graph.launch(stream)
        assert (out.get() == 1).all()
    assert graph.dependent_launches == 0
