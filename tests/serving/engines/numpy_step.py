"""The decoder of a GPU reader in plain fp32: its GEMMs on ONNX Runtime's CPU provider, NumPy between them. The GPU must equal it.

Attention is a loop over rows and heads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from serving.contract.gemms import BIAS, CROSS_BIAS, CROSS_KV_SCALES, EMBEDDING, HEAD, NORMS, array_file, decoder_gemms
from serving.contract.manifest import FLOAT8, Manifest
from tests.gpu.numpy_fp8 import narrowed, numbers
from tests.serving.engines.numpy_rows import activate, load_gemms, norm


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
