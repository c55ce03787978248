"""The Triton model of an encoder: passages of a question, or of several that Triton's dynamic batcher joined, in one engine call."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.contract.tensors import ShapeError, encoder_tensors
from serving.engines.base import is_fatal
from serving.engines.load import load_encoder

from .metrics import EncoderMetrics
from .shutdown import end_process, exit_soon


class EncoderModel:
    """Triton's interface: initialize once, execute batches, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the encoder engine from the model's version folder; a missing or altered one refuses the load."""
        self._name = args["model_name"]
        parameters = json.loads(args["model_config"]).get("parameters", {})
        directory = Path(args["model_repository"]).resolve() / args["model_version"]
        try:
            limits = Limits.from_parameters(parameters)
            manifest = Manifest.load(directory)
            self._encoder = load_encoder(directory, manifest, limits, int(args["model_instance_device_id"]))
        except (ValueError, RuntimeError) as error:
            raise pb_utils.TritonModelException(f"{self._name}: {error}") from error
        self._tensors = encoder_tensors(manifest.sizes, "float16" if manifest.on_gpu else "float32")
        self._vocab_size = manifest.sizes.vocab_size
        self._on_gpu = manifest.on_gpu
        self._metrics = EncoderMetrics(self._name)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode all requests of the batch together; each gets its own rows, or its own error."""
        responses: list[Any] = [None] * len(requests)
        batch, places = [], []
        for place, request in enumerate(requests):
            try:
                batch.append(self._checked(request))
                places.append(place)
            except Exception as error:  # a tensor that is missing or elsewhere than in host memory, for one
                responses[place] = _error(error, pb_utils.TritonError.INVALID_ARG)
        for place, hidden in zip(places, self._encoded(batch), strict=True):
            responses[place] = self._response(hidden)
        return responses

    def _checked(self, request: Any) -> tuple[np.ndarray, np.ndarray]:
        """A request's input_ids and attention_mask.

        Raises:
            ShapeError: if the engine could not run them, or they would harm another request of the batch.
        """
        ids, mask = (pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy() for spec in self._tensors.inputs)
        for spec, array in zip(self._tensors.inputs, (ids, mask), strict=True):
            spec.check(array)
        if mask.shape != ids.shape:
            raise ShapeError(f"attention_mask: wanted the shape of input_ids, {list(ids.shape)}, got {list(mask.shape)}")
        if not ids.size:
            raise ShapeError(f"input_ids: wanted at least one passage of at least one token, got {list(ids.shape)}")
        if ((mask != 0) & (mask != 1)).any() or (np.diff(mask, axis=1) > 0).any():
            raise ShapeError("attention_mask: wanted rows of ones and then zeros, for valid tokens and then padding; got other values")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            outside = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise ShapeError(f"input_ids: wanted 0 to {self._vocab_size - 1}, got {outside}")
        return ids, mask

    def _encoded(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[Any]:
        """Hidden states of each request, or the exception that it gets: together, and one by one if that fails."""
        if not batch:
            return []
        started = time.perf_counter()
        try:
            encoded: list[Any] = list(self._encoder.encode(batch))
        except Exception as error:
            if is_fatal(error):
                end_process(f"{self._name}: {error}")
                return [error] * len(batch)
            if len(batch) == 1:
                return [error]
            return [self._encoded([one])[0] for one in batch]
        self._metrics.encoded(time.perf_counter() - started, sum(len(m) for _, m in batch), int(sum(m.sum() for _, m in batch)))
        return encoded

    def _response(self, hidden: Any) -> Any:
        if isinstance(hidden, Exception):
            return _error(hidden, pb_utils.TritonError.INTERNAL)
        (output,) = self._tensors.outputs
        tensor = pb_utils.Tensor.from_dlpack(output.name, hidden) if self._on_gpu else pb_utils.Tensor(output.name, hidden)
        return pb_utils.InferenceResponse([tensor])

    def finalize(self) -> None:
        """Release the engine before the process ends, as ReaderModel does."""
        del self._encoder
        gc.collect()
        exit_soon(on_gpu=self._on_gpu)


def _error(error: Exception, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
