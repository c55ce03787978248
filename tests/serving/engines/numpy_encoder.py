"""The encoder of a GPU reader in plain fp32: its GEMMs on ONNX Runtime's CPU provider, NumPy between them. The GPU must equal it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from serving.contract.gemms import BIAS, EMBEDDING, NORMS, array_file, encoder_gemms
from serving.contract.manifest import Manifest
from tests.serving.engines.numpy_rows import activate, attend_within_passages, load_gemms, norm


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
