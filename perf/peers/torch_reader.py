"""The peer in eager PyTorch: a batch of questions with a key/value cache, padded as in facebookresearch/FiD.

It runs the export's modules (encoder, cross_kv and decoder_step) in torch, so that a comparison is of runtimes and not of implementations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.graphs.cpu import CrossKVGraph, DecoderStepGraph
from export.model.reader import Reader
from serving.pipeline.prompt import EncoderInput


class TorchReader:
    """Greedy answers of a batch; the batch runs until its last answer ends."""

    def __init__(self, reader: Reader, max_new_tokens: int):
        self._reader, self._max_new_tokens = reader, max_new_tokens
        self._cross_kv, self._step = CrossKVGraph(reader).eval(), DecoderStepGraph(reader).eval()

    @torch.inference_mode()
    def answer(self, questions: Sequence[EncoderInput]) -> list[list[int]]:
        """Token ids of each question's answer, the end token included."""
        config, batch = self._reader.config, len(questions)
        shape = (batch, max(len(q.input_ids) for q in questions), max(q.input_ids.shape[1] for q in questions))
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for i, question in enumerate(questions):
            n, length = question.input_ids.shape
            ids[i, :n, :length] = torch.from_numpy(question.input_ids)
            mask[i, :n, :length] = torch.from_numpy(question.attention_mask)
        hidden, _ = self._reader.encode(ids, mask)
        packed = [h[m.reshape(-1).bool()] for h, m in zip(hidden, mask, strict=True)]
        lengths = torch.tensor([len(p) for p in packed], dtype=torch.int32)
        cross = self._stacked([self._cross_kv(p) for p in packed])
        stack = config.decoder
        past = [torch.zeros(batch, stack.num_kv_heads, self._max_new_tokens, stack.d_kv) for _ in range(2 * stack.num_layers)]
        tokens = torch.full((batch,), config.decoder_start_token_id, dtype=torch.int32)
        answers: list[list[int]] = [[] for _ in range(batch)]
        running = [True] * batch
        for position in range(self._max_new_tokens):
            positions = torch.full((batch,), position, dtype=torch.int32)
            read = [cache[:, :, : position + 1] for cache in past]
            tokens, _, _, *present = self._step(tokens, positions, lengths, torch.zeros(batch), *read, *cross)
            for cache, new in zip(past, present, strict=True):
                cache[:, :, position] = new
            for row, token in enumerate(tokens.tolist()):
                if running[row]:
                    answers[row].append(token)
                    running[row] = token != config.eos_token_id
            if not any(running):
                break
        return answers

    @staticmethod
    def _stacked(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Per tensor: float[batch, num_kv_heads, longest, d_kv], zero beyond each row's length."""
        longest = max(row[0].shape[1] for row in rows)
        stacked = []
        for tensors in zip(*rows, strict=True):
            out = torch.zeros(len(rows), tensors[0].shape[0], longest, tensors[0].shape[2])
            for i, tensor in enumerate(tensors):
                out[i, :, : tensor.shape[1]] = tensor
            stacked.append(out)
        return stacked
