"""How a client leaves a stream: it has the server stop the answer, and reads the stream to its end. Shared by both clients.

A client that cancels a gRPC stream may end Triton 2.51 and 2.71, with the questions of all other clients (serving/triton/final_flag.py).
So a client that leaves sends a request with the id "stop:" + the stream's id (serving/triton/stop.py). Only if that request fails is the
stream cancelled.
"""

from __future__ import annotations

import secrets

import numpy as np
from tritonclient.utils import InferenceServerException

STOP_TIMEOUT_S = 5.0  # of the request that stops a stream
BACKSTOP_S = 10.0  # after a stream's deadline, gRPC cancels it if the server has not ended it by then
CLOSE_TIMEOUT_S = 2.0  # for streams to end, when the connection is closed
_STOP_PREFIX = "stop:"


def new_stream_id() -> str:
    """An id that nobody else can guess: who knows it can stop the stream."""
    return secrets.token_hex(16)


def stop_id(stream_id: str) -> str:
    """The id of the request that stops a stream."""
    return _STOP_PREFIX + stream_id


def stop_tensors() -> dict[str, np.ndarray]:
    """The tensors of such a request. A server that does not know it refuses them, since the question is empty."""
    return {name: np.array([b""], dtype=np.object_) for name in ("question", "passages")}


def deadline_exceeded() -> InferenceServerException:
    """The error of an answer that was not complete in time."""
    return InferenceServerException("the answer was not complete in time", status="StatusCode.DEADLINE_EXCEEDED")
