"""The encoder on a GPU: passages of several questions in, hidden states on the GPU out."""

from __future__ import annotations

from collections.abc import Sequence

import cupy as cp
import numpy as np

from .gpu_engine import LoadEngine, Scratch
from .gpu_plan import encoder_batch
from .limits import Limits
from .manifest import Manifest
from .onnx_engine import grouped_by_length
from .tensors import encoder_tensors

LENGTH_STEP = 32  # passages are padded to a multiple of it: tensor cores work on tiles


class GpuEncoder:
    """The encoder engine; not to be called from two threads at once."""

    def __init__(self, manifest: Manifest, load: LoadEngine, limits: Limits):
        self.d_model = manifest.sizes.d_model_encoder
        self._passage_length = manifest.prompt.passage_length
        self._most = encoder_batch(limits)
        self._stream = cp.cuda.Stream(non_blocking=True)
        with self._stream:
            scratch = Scratch()
            self._engine = load("encoder", encoder_tensors(manifest.sizes, "float16"), scratch)
            self.bytes = self._engine.weight_bytes + scratch.bytes
            self.encode([(np.ones((1, self._passage_length), np.int32),) * 2])  # what is set up on first use is set up now

    def encode(self, batch: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[cp.ndarray]:
        """Encode the passages of several questions at once.

        Args:
            batch: (input_ids, attention_mask) a question, each int32[n_passages, passage_length]; valid tokens come first in a row.

        Returns:
            float16[n_passages, passage_length, d_model] a question, on the GPU and finished; zero where the mask is.
        """
        with self._stream:
            outputs = [cp.zeros((*ids.shape, self.d_model), cp.float16) for ids, _ in batch]
            rows = [
                (self._padded(int(length)), q, r) for q, (_, mask) in enumerate(batch) for r, length in enumerate(mask.sum(1)) if length
            ]
            for group in grouped_by_length(rows, self._most * self._passage_length, self._most):
                self._encode_group(batch, group, outputs)
            self._stream.synchronize()
        return outputs

    def _padded(self, length: int) -> int:
        return min(-(-length // LENGTH_STEP) * LENGTH_STEP, self._passage_length)

    def _encode_group(
        self, batch: Sequence[tuple[np.ndarray, np.ndarray]], group: list[tuple[int, int, int]], outputs: list[cp.ndarray]
    ) -> None:
        width = group[0][0]
        ids_and_mask = np.zeros((2, len(group), width), np.int32)
        for i, (_, q, r) in enumerate(group):
            taken = min(width, batch[q][0].shape[1])
            ids_and_mask[0, i, :taken], ids_and_mask[1, i, :taken] = batch[q][0][r, :taken], batch[q][1][r, :taken]
        on_gpu = cp.asarray(ids_and_mask)
        hidden = cp.empty((len(group), width, self.d_model), cp.float16)
        call = self._engine.bind({"input_ids": on_gpu[0], "attention_mask": on_gpu[1]}, {"encoder_hidden_states": hidden})
        call.enqueue(self._stream)
        hidden *= on_gpu[1][:, :, None].astype(cp.float16)
        by_question: dict[int, list[tuple[int, int]]] = {}
        for i, (_, q, r) in enumerate(group):
            by_question.setdefault(q, []).append((i, r))
        for q, pairs in by_question.items():
            taken = min(width, outputs[q].shape[1])
            sources, targets = (np.array(side, np.int32) for side in zip(*pairs, strict=True))
            outputs[q][cp.asarray(targets), :taken] = hidden[cp.asarray(sources), :taken]
