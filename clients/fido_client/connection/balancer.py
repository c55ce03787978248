"""Several servers behind one client: each request goes to the next address, and addresses that failed a moment ago come last.

In: a transport for each address. Out: one transport. It retries nothing itself: a retry is a new request, which goes to the next address.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import InferResult
from tritonclient.utils import InferenceServerException

from ..errors import status_and_message
from .grpc_transport import Call, Stream, Transport
from .served_models import ServedModel

# An address that is not available is left out for so long, and twice as long each time until it answers.
_FIRST_REST_S, _MAX_REST_S = 0.5, 8.0


class Balancer:
    """Which of several addresses is next; safe to share between threads."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._failures = [0] * count
        self._rests_until_s = [0.0] * count

    def pick(self) -> int:
        """The next address that does not rest; if all do, the one that has rested longest."""
        with self._lock:
            now_s, count = time.monotonic(), len(self._failures)
            order = [(self._next + step) % count for step in range(count)]
            chosen = next((index for index in order if self._rests_until_s[index] <= now_s), None)
            if chosen is None:
                chosen = min(order, key=lambda index: self._rests_until_s[index])
            self._next = (chosen + 1) % count
            return chosen

    def report(self, index: int, error: Exception | None) -> None:
        """Say how a request ended: its error, or None for an answer. Only an address that is not available rests."""
        is_unavailable = error is not None and status_and_message(error)[0] == "UNAVAILABLE"
        with self._lock:
            self._failures[index] = self._failures[index] + 1 if is_unavailable else 0
            rest_s = min(_MAX_REST_S, _FIRST_REST_S * 2 ** min(self._failures[index] - 1, 10)) if is_unavailable else 0.0
            self._rests_until_s[index] = time.monotonic() + rest_s


class BalancedTransport:
    """A transport over those of several addresses."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = tuple(transports)
        self._balancer = Balancer(len(self._transports))

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the unary model is ready on one of the servers."""
        return any(transport.is_ready(timeout_s) for transport in self._transports)

    def served_model(self) -> ServedModel:
        """The configuration of the unary model, from the first server that answers; the last one's error if none does."""
        for transport in self._transports[:-1]:
            try:
                return transport.served_model()
            except (grpc.RpcError, InferenceServerException):
                continue
        return self._transports[-1].served_model()

    def infer(self, tensors: Mapping[str, np.ndarray], timeout_s: float) -> InferResult:
        """One request and its result, by the next server."""
        index = self._balancer.pick()
        try:
            result = self._transports[index].infer(tensors, timeout_s)
        except InferenceServerException as error:
            self._balancer.report(index, error)
            raise
        self._balancer.report(index, None)
        return result

    def submit(self, tensors: Mapping[str, np.ndarray], timeout_s: float, arrived: Callable[[Any, Any], None]) -> Call:
        """`infer` without waiting; `arrived` gets the result or the error, the other one None."""
        index = self._balancer.pick()

        def reported(result: Any, error: Any) -> None:
            self._balancer.report(index, error)
            arrived(result, error)

        return self._transports[index].submit(tensors, timeout_s, reported)

    def open_stream(self, tensors: Mapping[str, np.ndarray], deadline_s: float, start_s: float) -> Stream:
        """Send a streaming request to the next server; `start_s`, of time.perf_counter, is when its deadline began."""
        index = self._balancer.pick()
        return _ReportedStream(self._transports[index].open_stream(tensors, deadline_s, start_s), self._balancer, index)

    def close(self) -> None:
        """Close all connections."""
        for transport in self._transports:
            transport.close()


class _ReportedStream:
    """A stream whose first response, or failure, is reported."""

    def __init__(self, stream: Stream, balancer: Balancer, index: int) -> None:
        self._stream, self._balancer, self._index = stream, balancer, index

    def next_response(self) -> Any:
        try:
            response = self._stream.next_response()
        except (grpc.RpcError, InferenceServerException) as error:
            self._balancer.report(self._index, error)
            raise
        if response is not None:
            self._balancer.report(self._index, InferenceServerException(response.error_message) if response.error_message else None)
        return response

    def leave(self) -> None:
        self._stream.leave()
