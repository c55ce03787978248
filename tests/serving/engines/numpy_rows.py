"""The arithmetic of the GPU's kernels in plain NumPy, in the precision of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.contract.gemms import Gemm, StackSizes


def norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def activate(inner: np.ndarray, stack: StackSizes) -> np.ndarray:
    if not stack.gated:
        return np.maximum(inner, 0)
    gate, linear = np.split(inner, 2, axis=1)
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * linear


def attend_within_passages(query_key_value: np.ndarray, lengths: list[int], bias: np.ndarray, stack: StackSizes) -> np.ndarray:
    """[tokens, 3 * heads * d_kv] -> [tokens, heads * d_kv]; bias [2 * max_relative_distance + 1, heads] by key minus query."""
    out = np.empty((len(query_key_value), stack.num_heads * stack.d_kv), query_key_value.dtype)
    first, max_relative_distance = 0, len(bias) // 2
    for length in lengths:
        rows = query_key_value[first : first + length].reshape(length, 3, stack.num_heads, stack.d_kv)
        distance = np.arange(length)[None, :] - np.arange(length)[:, None]
        table = bias[distance.clip(-max_relative_distance, max_relative_distance) + max_relative_distance]  # [queries, keys, heads]
        scores = np.einsum("qhd,khd->hqk", rows[:, 0], rows[:, 1]) + table.transpose(2, 0, 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[first : first + length] = np.einsum("hqk,khd->qhd", weights, rows[:, 2]).reshape(length, -1)
        first += length
    return out


def as_splits(rows: np.ndarray, k_splits: int) -> np.ndarray:
    """[rows, columns] as the input of a split-K GEMM: [k_splits, rows, columns / k_splits]."""
    return rows if k_splits == 1 else np.ascontiguousarray(rows.reshape(len(rows), k_splits, -1).transpose(1, 0, 2))


def whole(y: np.ndarray) -> np.ndarray:
    """A GEMM's output, its splits summed."""
    return y.astype(np.float32).sum(0) if y.ndim == 3 else y


def load_gemms(directory: Path, gemms: Sequence[Gemm]) -> list[tuple[Gemm, Callable[[np.ndarray], np.ndarray]]]:
    """Each GEMM with a function that multiplies by its weights as its exported graph does, from any float to float32.

    The splits of a split-K GEMM are summed.
    """
    sessions = {p.engine: ort.InferenceSession(str(directory / f"{p.engine}.onnx")) for p in gemms}

    def multiply(session: ort.InferenceSession, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        k_splits = weight.shape[0] if weight.ndim == 3 else 1
        (y,) = session.run(None, {"x": as_splits(x.astype(np.float16), k_splits), "weight": weight})
        return whole(y.astype(np.float32))

    return [(p, functools.partial(multiply, sessions[p.engine], np.load(directory / p.weight, allow_pickle=False))) for p in gemms]
