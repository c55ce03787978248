"""From a checked request to packed hidden states: tokenize, call the encoder model, pack.

The encoder is a Triton model of its own, called through BLS, so that its batcher joins passages of several questions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.engines.base import Packer
from serving.pipeline.encoder_cache import EncoderStateCache
from serving.pipeline.prompt import PASSAGES_PER_CHUNK, EncoderInput, PromptEncoder
from serving.pipeline.request import ReaderRequest

CONCURRENT_CALLS = 4  # chunks at the encoder model at the same time


class EncoderCall:
    """Encodes questions. Safe to share between threads.

    Args:
        model: name of the encoder model.
        prompt: of this reader.
        packer: of this reader.
        gpu: device whose memory the hidden states shall stay in; None for host memory.
        cache: of states in host memory; None = every passage is encoded.
    """

    def __init__(self, model: str, prompt: PromptEncoder, packer: Packer, gpu: int | None, cache: EncoderStateCache | None = None):
        self._model, self._prompt, self._packer, self._cache = model, prompt, packer, cache
        self._memory = {}
        if gpu is not None:
            self._memory = {"preferred_memory": pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, gpu)}
        self._calls = ThreadPoolExecutor(CONCURRENT_CALLS, thread_name_prefix="encoder-call")

    def encode(
        self,
        request: ReaderRequest,
        on_tokenized: Callable[[np.ndarray], None],
        cancel_reason: Callable[[], Exception | None],
        *,
        in_chunks: bool,
    ) -> tuple[Any, np.ndarray]:
        """Encode one question. Runs on the caller's thread until the hidden states are there.

        Args:
            request: the question with its passages.
            on_tokenized: called with int[n_passages], the valid tokens of each passage, before the last call to the encoder.
            cancel_reason: called between steps of the tokenizer: None, or the error to stop with.
            in_chunks: for a question that has the reader to itself.

        Returns:
            float[encoder_sequence_length, d_model], packed, and int32[encoder_sequence_length], each token's encoder position.

        Raises:
            PromptError: if the question does not fit into a prompt.
            SchedulerError: what `cancel_reason` returned.
            RuntimeError: if the encoder model answers with an error.
        """
        size = PASSAGES_PER_CHUNK if in_chunks else len(request.passages)
        chunks: list[EncoderInput] = []
        calls: list[Future[Any]] = []
        for chunk in self._prompt.encode_in_chunks(request.question, request.passages, request.titles, size, cancel_reason):
            chunks.append(chunk)
            if len(chunks) * size < len(request.passages):
                calls.append(self._calls.submit(self._call, chunk))
        on_tokenized(np.concatenate([chunk.attention_mask.sum(1) for chunk in chunks]))
        last = self._call(chunks[-1])
        hidden = self._packer.concatenate([*(call.result() for call in calls), last])
        return hidden, np.concatenate([chunk.encoder_positions for chunk in chunks])

    def close(self) -> None:
        """Wait for calls in flight and stop the threads."""
        self._calls.shutdown()

    def _call(self, chunk: EncoderInput) -> Any:
        """The valid hidden states of a chunk, packed: those that are kept, and the others from the encoder model."""
        if self._cache is None:
            return self._encoded(chunk.input_ids, chunk.attention_mask)
        return self._cache.encode(chunk.input_ids, chunk.attention_mask, self._encoded)

    def _encoded(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Any:
        response = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=["encoder_hidden_states"],
            inputs=[
                pb_utils.Tensor("input_ids", input_ids),
                pb_utils.Tensor("attention_mask", attention_mask),
            ],
            **self._memory,
        ).exec()
        if response.has_error():
            raise RuntimeError(f"{self._model}: {response.error().message()}")
        states = _array(pb_utils.get_output_tensor_by_name(response, "encoder_hidden_states"))
        return self._packer.pack(states, attention_mask)  # a copy: the tensor's memory goes with the response


def _array(tensor: Any) -> Any:
    """A response's tensor where it lies: NumPy's array of host memory, or CuPy's of GPU memory."""
    if tensor.is_cpu():
        return tensor.as_numpy()
    import cupy

    return cupy.from_dlpack(tensor)
