"""The Triton models `fid_encoder` and `fido_encoder`: passages of whatever questions the dynamic batcher put together, one engine call.

One of the two modules that import Triton's Python backend; everything that can be tested without it is elsewhere.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.contract.tensors import ShapeError, encoder_tensors
from serving.engines.load import load_encoder

from .metrics import EncoderMetrics
from .shutdown import exit_soon


class EncoderModel:
    """Triton's contract: initialize once, execute batches."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the encoder engine from the model's version folder; a missing or altered one refuses the load."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        directory = Path(args["model_repository"]).resolve() / args["model_version"]
        try:
            limits = Limits.from_parameters(parameters)
            manifest = Manifest.load(directory)
            self._encoder = load_encoder(directory, manifest, limits, int(args["model_instance_device_id"]))
        except (ValueError, RuntimeError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from error
        self._tensors = encoder_tensors(manifest.sizes, "float16" if manifest.on_gpu else "float32")
        self._on_gpu = manifest.on_gpu
        self._metrics = EncoderMetrics(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode all requests of the batch together; each gets its own rows, or its own error."""
        responses: list[Any] = [None] * len(requests)
        batch, places = [], []
        for place, request in enumerate(requests):
            arrays = [pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy() for spec in self._tensors.inputs]
            try:
                for spec, array in zip(self._tensors.inputs, arrays, strict=True):
                    spec.check(array)
            except ShapeError as error:
                responses[place] = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
                continue
            batch.append((arrays[0], arrays[1]))
            places.append(place)
        (output,) = self._tensors.outputs
        started = time.perf_counter()
        encoded = self._encoder.encode(batch)
        self._metrics.encoded(time.perf_counter() - started, sum(len(m) for _, m in batch), int(sum(m.sum() for _, m in batch)))
        for place, hidden in zip(places, encoded, strict=True):
            tensor = pb_utils.Tensor.from_dlpack(output.name, hidden) if self._on_gpu else pb_utils.Tensor(output.name, hidden)
            responses[place] = pb_utils.InferenceResponse([tensor])
        return responses

    def finalize(self) -> None:
        """Let the engine go while the process is whole, as ReaderModel does."""
        del self._encoder
        gc.collect()
        exit_soon(on_gpu=self._on_gpu)
