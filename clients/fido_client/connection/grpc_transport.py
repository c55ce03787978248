"""Triton's gRPC endpoint: requests to one reader, and their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException

from ..request import infer_inputs_from_tensors, infer_message_from_tensors
from .endpoint import Endpoint, grpc_timeout_s
from .served_models import ServedModel, served_model
from .stream_call import StreamCall, StreamChannel


class Call(Protocol):
    """A unary request in flight."""

    def cancel(self) -> Any:
        """Give it up."""


class Stream(Protocol):
    """A stream in flight."""

    def next_response(self) -> Any:
        """The next response; None at the end. Raises TimeoutError at the deadline, and what the transport raises."""

    def leave(self) -> None:
        """Have the server stop the answer, unless it is complete."""


class Transport(Protocol):
    """What a client needs of a connection; http_transport.py has the other one."""

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the unary model is ready."""

    def served_model(self) -> ServedModel:
        """The configuration of the unary model."""

    def infer(self, tensors: Mapping[str, np.ndarray], timeout_s: float) -> InferResult:
        """One request and its result."""

    def submit(self, tensors: Mapping[str, np.ndarray], timeout_s: float, arrived: Callable[[Any, Any], None]) -> Call:
        """The same without waiting; `arrived` gets the result or the error, the other one None."""

    def open_stream(self, tensors: Mapping[str, np.ndarray], deadline_s: float, start_s: float) -> Stream:
        """Send a streaming request; `start_s`, of time.perf_counter, is when its deadline began."""

    def close(self) -> None:
        """Close the connection."""


class GrpcTransport:
    """Requests to one reader over gRPC; safe to share between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        credentials = endpoint.credentials()
        self._client = InferenceServerClient(endpoint.url, creds=credentials, channel_args=endpoint.channel_args())
        # tritonclient allows one stream per client and leaks a thread for each cancelled stream, so streams have a channel of their own.
        # gRPC shares one connection between both channels.
        self._streams = StreamChannel(endpoint)

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the unary model is ready."""
        try:
            return bool(self._client.is_model_ready(self._endpoint.model, client_timeout=timeout_s))
        except InferenceServerException:
            return False

    def served_model(self) -> ServedModel:
        """The configuration of the unary model.

        Raises:
            grpc.RpcError: If the server does not answer, or does not have the model.
        """
        return served_model(self._endpoint)

    def infer(self, tensors: Mapping[str, np.ndarray], timeout_s: float) -> InferResult:
        """One request and its result.

        Raises:
            InferenceServerException: If the request fails.
        """
        return self._client.infer(self._endpoint.model, infer_inputs_from_tensors(tensors), client_timeout=grpc_timeout_s(timeout_s))

    def submit(self, tensors: Mapping[str, np.ndarray], timeout_s: float, arrived: Callable[[Any, Any], None]) -> Call:
        """`infer` without waiting; gRPC's thread calls `arrived`."""
        inputs, model = infer_inputs_from_tensors(tensors), self._endpoint.model
        call: Call = self._client.async_infer(model, inputs, arrived, client_timeout=grpc_timeout_s(timeout_s))
        return call

    def open_stream(self, tensors: Mapping[str, np.ndarray], deadline_s: float, start_s: float) -> StreamCall:
        """Send a streaming request; `start_s`, of time.perf_counter, is when its deadline began."""
        return self._streams.open(infer_message_from_tensors(self._endpoint.streaming_model, tensors), deadline_s, start_s)

    def close(self) -> None:
        """Cancel the unary requests in flight, stop the streams, and close the connection."""
        self._client.close()
        self._streams.close()
