"""As much of CuPy as the GPU runtime uses, on NumPy, and stand-ins for the classes of kernels.py.

They test the runtime on machines without a GPU; tests/gpu tests the real ones. Enqueued work runs at once.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from serving.contract.gemms import StackSizes
from serving.contract.tensors import EngineSizes
from tests.serving.engines.numpy_reader import activate, as_splits, attend_within_passages, narrowed, norm, numbers, whole


class Array(np.ndarray):
    """An array with an address, as CuPy's have."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)


def array(values: Any) -> Array:
    return np.ascontiguousarray(values).view(Array)


class Context:
    """A stream or a device."""

    ptr = 0
    id = 0
    compute_capability = "90"
    attributes: ClassVar = {"MultiProcessorCount": 132}

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def use(self) -> None:
        pass


class Memory:
    """An allocation of device memory."""

    def __init__(self, size: int):
        self._bytes = np.zeros(size, np.uint8)
        self.ptr = self._bytes.ctypes.data


class CudaError(RuntimeError):
    """An error of CUDA with its number, as CuPy's have."""

    def __init__(self, status: int):
        self.status = status
        super().__init__(f"CUDA error {status}")


def memcpy(target: int, source: int, size: int, *_: object) -> None:
    ctypes.memmove(target, source, size)


def modules() -> dict[str, types.ModuleType]:
    """What to put into sys.modules."""
    cupy, cupyx = types.ModuleType("cupy"), types.ModuleType("cupyx")
    runtime = types.SimpleNamespace(
        memcpyAsync=memcpy,
        memGetInfo=lambda: (1 << 40, 1 << 40),
        getDeviceProperties=lambda device: {"name": b"NVIDIA H200", "major": 9, "minor": 0},
        CUDARuntimeError=CudaError,
    )
    driver = types.SimpleNamespace(CUDADriverError=CudaError)
    contents = {name: getattr(np, name) for name in ("float16", "float32", "int32", "uint8", "uint64")} | {
        "ndarray": Array,
        "asarray": array,
        "asnumpy": np.asarray,
        "empty": lambda shape, dtype: array(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -7, dtype)),
        "zeros": lambda shape, dtype: array(np.zeros(shape, dtype)),
        "cuda": types.SimpleNamespace(
            Stream=Context, Device=Context, runtime=runtime, driver=driver, alloc=Memory, get_current_stream=Context
        ),
    }
    for name, value in contents.items():
        setattr(cupy, name, value)
    cupyx.zeros_pinned = lambda shape, dtype: np.zeros(shape, dtype)  # type: ignore[attr-defined]
    kernels = types.ModuleType("serving.engines.gpu.kernels")
    for stand_in in (RowKernels, SkinnyGemm, EncoderAttention, StepKernels, HeadKernels):
        setattr(kernels, stand_in.__name__, stand_in)
    attention = types.ModuleType("serving.engines.gpu.hopper_attention")
    attention.attention_for = EncoderAttention  # type: ignore[attr-defined]
    return {"cupy": cupy, "cupyx": cupyx, "serving.engines.gpu.kernels": kernels, "serving.engines.gpu.hopper_attention": attention}


def put(out: Array, rows: np.ndarray) -> None:
    """Write rows in the shape of the next GEMM's input."""
    out[:] = as_splits(rows, out.shape[0] if out.ndim == 3 else 1)


class RowKernels:
    def __init__(self, stack: StackSizes):
        self.stack = stack

    def embed(self, tokens: Array, embedding: Array, weight: Array, residual: Array, normed: Array) -> None:
        residual[:] = embedding[tokens]
        put(normed, norm(residual, weight, self.stack.epsilon))

    def add_and_norm(self, y: Array, weight: Array, residual: Array, normed: Array, destinations: Array | None = None) -> None:
        total = residual + whole(y)
        if destinations is None:
            residual[:] = total
            put(normed, norm(total, weight, self.stack.epsilon))
        else:
            normed[destinations] = norm(total, weight, self.stack.epsilon)

    def activate(self, inner: Array, out: Array) -> None:
        put(out, activate(inner.astype(np.float32), self.stack))


class SkinnyGemm:
    """Leaves three rows and more to the engine, so that a test runs both."""

    def takes(self, x: Array, weight: Array) -> bool:
        return bool(x.shape[-2] < 3 and weight.dtype == np.float16)

    def multiply(self, x: Array, weight: Array, y: Array) -> None:
        y[:] = x.astype(np.float32) @ weight.astype(np.float32)


class EncoderAttention:
    tile = 64

    def __init__(self, stack: StackSizes, max_relative_distance: int, max_length: int):
        self.stack, self.max_relative_distance, self.max_length = stack, max_relative_distance, max_length

    def __call__(self, query_key_value: Array, tiles: Array, longest: int, bias: Array, out: Array) -> None:
        assert len(bias) == 2 * self.max_relative_distance + 1
        lengths = [int(length) for _, length, start in tiles if start == 0 and length > 0]
        assert max(lengths, default=0) <= longest <= self.max_length
        rows = sum(lengths)  # what follows is padding
        out[:rows] = attend_within_passages(query_key_value[:rows].astype(np.float32), lengths, bias, self.stack)


class StepKernels:
    def __init__(self, sizes: EngineSizes, *, cross_fp8: bool = False):
        self.sizes, self.cross_fp8 = sizes, cross_fp8

    def max_splits(self, capacity: int) -> int:
        return 1

    def _rows(self, positions: Array, slots: Array) -> Iterator[tuple[int, int, int]]:
        return ((row, int(position), int(slots[row])) for row, position in enumerate(positions) if position >= 0)

    def _attend(self, query: np.ndarray, tokens: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.sizes
        keys, values = tokens.astype(np.float32).reshape(-1, 2, sizes.num_kv_heads, sizes.d_kv).transpose(1, 2, 0, 3)
        group = sizes.num_heads // sizes.num_kv_heads
        scores = np.einsum("hd,htd->ht", query.astype(np.float32).reshape(-1, sizes.d_kv), keys.repeat(group, 0))
        scores += 0 if bias is None else bias.T
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        return np.einsum("ht,htd->hd", weights, values.repeat(group, 0)).ravel(), weights.sum(0)

    def self_attention(self, y: Array, cache: Array, slots: Array, positions: Array, bias: Array, out: Array) -> None:
        queries, rows = self.sizes.num_heads * self.sizes.d_kv, whole(y)
        attended = np.zeros((len(rows), queries), np.float32)
        for row, position, slot in self._rows(positions, slots):
            cache[slot, position] = rows[row, queries:]
            distance = (position - np.arange(position + 1)).clip(0, len(bias) - 1)
            attended[row], _ = self._attend(rows[row, :queries], cache[slot, : position + 1], bias[distance])
        put(out, attended)

    def _across(self, row: int, position: int, slot: int, inputs: tuple) -> tuple[np.ndarray, np.ndarray]:
        query, cache, scales, _, lengths, _, bias, token_positions = inputs
        length = int(lengths[row])
        assert (cache.dtype == np.uint8) == (scales is not None) == self.cross_fp8
        if self.cross_fp8:
            rows = (numbers(cache[slot][:, :, :length]) * scales[:, :, None, None]).transpose(2, 0, 1, 3).reshape(length, -1)
        else:
            rows = cache[slot, :length]
        row_bias = None if bias is None else bias[(position - token_positions[slot, :length]).clip(0, len(bias) - 1)]
        return self._attend(query[row], rows, row_bias)

    def quantize_cross_kv(self, source: Array, scales: Array, tokens: int, cache: Array, row: int) -> None:
        for half, of_layer, narrow in zip(source, scales, cache, strict=True):
            wide = half[:tokens].reshape(tokens, 2, -1, self.sizes.d_kv).transpose(1, 2, 0, 3)
            narrow[row][:, :, :tokens] = narrowed(wide / of_layer[:, :, None, None])

    def cross_attention(self, *arguments: Any) -> None:
        inputs, out = arguments[:8], arguments[10]
        attended = np.zeros(inputs[0].shape, np.float32)
        for row, position, slot in self._rows(inputs[5], inputs[3]):
            attended[row], _ = self._across(row, position, slot, inputs)
        put(out, attended)

    def attribution(self, *arguments: Any) -> None:
        inputs, layer, weights = arguments[:8], arguments[9], arguments[10]
        for row, position, slot in self._rows(inputs[5], inputs[3]):
            if position == 0:
                _, total = self._across(row, position, slot, inputs)
                share = total / len(self.sizes.cross_attention_layers)
                weights[row, : len(total)] = share if layer == 0 else weights[row, : len(total)] + share


class HeadKernels:
    def __init__(self, d_model: int, vocab_size: int, eos_token_id: int):
        self.shape, self.eos = (vocab_size, d_model), eos_token_id

    def scratch(self, batch: int) -> None:
        pass

    def combine_argmax(self, hidden: Array, head: Array, eos_penalty: Array, found: None, token: Array, log_prob: Array) -> None:
        assert head.shape == self.shape
        wide = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
        wide[:, self.eos] += eos_penalty
        token[: len(wide)] = wide.argmax(1)
        log_prob[: len(wide)] = -np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1))
