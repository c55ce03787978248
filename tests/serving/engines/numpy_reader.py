"""A GPU reader in plain NumPy, fp32, with its GEMMs on ONNX Runtime's CPU provider: what encoder, decoder and kernels must equal.

Attention is a loop over rows and heads. E4m3 is here too, which NumPy has no type for: bytes to numbers and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.contract.gemms import (
    BIAS,
    CROSS_BIAS,
    CROSS_KV_SCALES,
    EMBEDDING,
    HEAD,
    NORMS,
    Gemm,
    StackSizes,
    array_file,
    decoder_gemms,
    encoder_gemms,
)
from serving.contract.manifest import FLOAT8, Manifest


def _magnitudes() -> np.ndarray:
    """float32[127], of bytes 0 to 126; byte 127 is not a number."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6).astype(np.float32)


MAGNITUDES = _magnitudes()


def numbers(narrow: np.ndarray) -> np.ndarray:
    """uint8 -> float32."""
    table = np.concatenate([MAGNITUDES, [np.nan], -MAGNITUDES, [np.nan]]).astype(np.float32)
    return table[narrow]


def narrowed(wide: np.ndarray) -> np.ndarray:
    """Float -> uint8, the nearest; beyond the largest the largest."""
    between = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    return (np.searchsorted(between, np.abs(wide)) + 128 * np.signbit(wide)).astype(np.uint8)


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


class NumpyEncoder:
    def __init__(self, directory: Path, manifest: Manifest):
        assert manifest.encoder is not None
        self.stack = manifest.encoder
        self.gemms = load_gemms(directory, encoder_gemms(self.stack))
        names = (array_file("encoder", name) for name in (EMBEDDING, NORMS, BIAS))
        self.embedding, self.norms, self.bias = (np.load(directory / name, allow_pickle=False) for name in names)

    def encode(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """int32[passages, passage_length] x2 -> float16[passages, passage_length, d_model]."""
        valid = attention_mask.astype(bool)
        lengths = [int(n) for n in attention_mask.sum(1) if n]
        residual = self.embedding[input_ids[valid]].astype(np.float32)
        norms = iter(self.norms)
        x = norm(residual, next(norms), self.stack.epsilon)
        for gemm, multiply in self.gemms:
            y = multiply(x)
            if gemm.kind == "qkv":
                x = attend_within_passages(y, lengths, self.bias, self.stack)
            elif gemm.kind == "wi":
                x = activate(y, self.stack)
            else:
                residual = residual + y
                x = norm(residual, next(norms), self.stack.epsilon)
        out = np.zeros((*input_ids.shape, self.stack.d_model), np.float16)
        out[valid] = x
        return out


class NumpyStep:
    def __init__(self, directory: Path, manifest: Manifest, slots: int, length: int = 64, self_length: int = 64):
        assert manifest.decoder is not None
        self.sizes, self.stack, self.slots = manifest.sizes, manifest.decoder, slots
        self.gemms = load_gemms(directory, decoder_gemms(manifest.sizes))
        self.cross_kv = ort.InferenceSession(str(directory / "cross_kv.onnx"))
        files = {name: directory / array_file("decoder", name) for name in (EMBEDDING, NORMS, BIAS, CROSS_BIAS, HEAD)}
        arrays = {name: np.load(file, allow_pickle=False) for name, file in files.items() if file.exists()}
        self.embedding, self.norms, self.self_bias, self.cross_bias = arrays[EMBEDDING], arrays[NORMS], arrays[BIAS], arrays.get(CROSS_BIAS)
        self.head = arrays[HEAD].astype(np.float64)
        scales = directory / array_file("decoder", CROSS_KV_SCALES)
        self.scales = np.load(scales, allow_pickle=False) if manifest.cross_kv_precision == FLOAT8 else None
        self.positions: dict[int, np.ndarray] = {}
        self.cache: dict[tuple[str, int, int], np.ndarray] = {}  # (kind, layer, slot) -> [tokens, 2 * kv_heads * d_kv]

    def admit(self, slot: int, running: int, hidden: np.ndarray, encoder_positions: np.ndarray) -> None:
        y = self.cross_kv.run(None, {"encoder_hidden_states": hidden.astype(np.float16)})
        for index, (layer, rows) in enumerate(zip(self.sizes.cross_attention_layers, y, strict=True)):
            wide = rows.astype(np.float32)
            if self.scales is not None:  # what e4m3 holds of them
                scale = self.scales[index].ravel().repeat(self.sizes.d_kv)
                wide = numbers(narrowed(wide / scale)) * scale
            self.cache["cross", layer, slot] = wide
        self.positions[slot] = encoder_positions

    def move(self, source: int, target: int) -> None:
        self.positions[target] = self.positions[source]
        for kind, layer, slot in list(self.cache):
            if slot == source:
                self.cache[kind, layer, target] = self.cache[kind, layer, source]

    def attend(self, queries: np.ndarray, rows: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """[heads, d_kv] and [tokens, 2 * kv_heads * d_kv] -> [heads * d_kv], and the weights summed over heads."""
        heads, kv_heads, d_kv = self.sizes.num_heads, self.sizes.num_kv_heads, self.sizes.d_kv
        keys, values = rows.reshape(-1, 2, kv_heads, d_kv).transpose(1, 2, 0, 3)
        attended, total = [], np.zeros(len(rows), np.float32)
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = keys[group] @ queries[head] + (0 if bias is None else bias[:, head])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            attended.append(weights @ values[group])
            total += weights
        return np.concatenate(attended), total

    def attention(self, kind: str, layer: int, y: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        heads, d_kv = self.sizes.num_heads, self.sizes.d_kv
        out, weights = [], []
        for row, position in enumerate(positions):
            queries = y[row, : heads * d_kv].reshape(heads, d_kv)
            if kind == "self":
                new = y[row : row + 1, heads * d_kv :]
                past = self.cache["self", layer, row][:position] if position else new[:0]
                cache = self.cache["self", layer, row] = np.concatenate([past, new])
                bias = self.self_bias[np.minimum(position - np.arange(len(cache)), len(self.self_bias) - 1)]
            else:
                cache, bias = self.cache["cross", layer, row], None
                if self.cross_bias is not None:
                    bias = self.cross_bias[np.clip(position - self.positions[row], 0, len(self.cross_bias) - 1)]
            attended, total = self.attend(queries, cache, bias)
            out.append(attended)
            weights.append(total)
        return np.array(out, np.float32), weights

    def step(self, tokens: np.ndarray, positions: np.ndarray, eos_penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        attribution = np.zeros((len(tokens), max(len(self.positions[row]) for row in range(len(tokens)))), np.float32)
        norms = iter(self.norms)
        residual = self.embedding[tokens].astype(np.float32)
        x = norm(residual, next(norms), self.stack.epsilon)
        for gemm, multiply in self.gemms:
            y = multiply(x)
            if gemm.kind == "qkv":
                x, _ = self.attention("self", gemm.layer, y, positions)
            elif gemm.kind == "cross_q":
                x, weights = self.attention("cross", gemm.layer, y, positions)
                for row, total in enumerate(weights):
                    attribution[row, : len(total)] += total / len(self.sizes.cross_attention_layers)
            elif gemm.kind == "wi":
                x = activate(y, self.stack)
            else:
                residual = residual + y
                x = norm(residual, next(norms), self.stack.epsilon)
        logits = x.astype(np.float16) @ self.head.T
        logits[:, 1] += eos_penalty  # the readers of the tests and the demo end with token 1
        log_probs = logits.max(1) - logits.max(1, keepdims=True)[:, 0] - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
        return logits.argmax(1).astype(np.int32), log_probs.astype(np.float32), attribution
