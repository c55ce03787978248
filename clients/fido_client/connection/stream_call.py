"""StreamCall: one streamed request over gRPC, read to its end on a thread of its own whether or not its consumer stays.

In: a request's message. Out: the server's responses, one by one. It does not parse them. The final flag comes later than the last response,
so a consumer that waited for the stream's end would have its answer late.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ..request import infer_message_from_tensors
from .endpoint import Endpoint, grpc_timeout_s
from .stop import BACKSTOP_S, CLOSE_TIMEOUT_S, STOP_TIMEOUT_S, new_stream_id, stop_id, stop_tensors


class StreamChannel:
    """The connection for streams; safe to share between threads. Once closed, it ends when the last stream has ended."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = endpoint.channel(endpoint.credentials())
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._calls: weakref.WeakSet[StreamCall] = weakref.WeakSet()
        self._lock = threading.RLock()  # a stream that the collector frees inside `open` is left there, by the same thread
        self._running = 0
        self._closing = False

    def open(self, message: service_pb2.ModelInferRequest, deadline_s: float, start_s: float) -> StreamCall:
        """Send a request; `start_s`, of time.perf_counter, is when its deadline began."""
        call = StreamCall(self, message, deadline_s, start_s)
        with self._lock:
            self._calls.add(call)
        return call

    def start(self, target: Any, *args: Any) -> None:
        """Run target(*args) on a thread. The connection is kept until it returns."""
        with self._lock:
            self._running += 1
        threading.Thread(target=self._run, args=(target, *args), name="stream", daemon=True).start()

    def close(self) -> None:
        """Stop all streams and close the connection once they have ended, at the latest after CLOSE_TIMEOUT_S. Returns at once."""
        with self._lock:
            self._closing = True
            calls = list(self._calls)
        for call in calls:
            call.leave()
        with self._lock:
            is_idle = not self._running
        if is_idle:
            self._channel.close()
        else:
            timer = threading.Timer(CLOSE_TIMEOUT_S, self._channel.close)
            timer.daemon = True
            timer.start()

    def _run(self, target: Any, *args: Any) -> None:
        try:
            target(*args)
        finally:
            with self._lock:
                self._running -= 1
                is_last = self._closing and not self._running
            if is_last:
                self._channel.close()


class StreamCall:
    """One stream in flight. `leave` it where its responses are no longer wanted."""

    def __init__(self, channel: StreamChannel, message: service_pb2.ModelInferRequest, deadline_s: float, start_s: float) -> None:
        message.id = new_stream_id()
        self._channel, self._model, self._id = channel, message.model_name, message.id
        self._end_s = start_s + deadline_s
        self._arrivals: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._over = threading.Event()
        self._left = False
        # The iterator ends after one request, so Triton ends the stream after its answer. Do not send the header triton_grpc_error, which
        # would give errors their status: in Triton 2.51 an error under it may crash the server (segmentation fault).
        self._call = channel.stub.ModelStreamInfer(iter([message]), timeout=grpc_timeout_s(deadline_s + BACKSTOP_S))
        channel.start(_read_out, self._call, self._arrivals, self._over)

    def next_response(self) -> Any:
        """The next response; None at the end of the stream.

        Raises:
            TimeoutError: If the deadline has passed.
            grpc.RpcError: If the stream has failed.
        """
        left_s = self._end_s - time.perf_counter()
        try:
            arrival = self._arrivals.get(timeout=None if grpc_timeout_s(left_s) is None else max(left_s, 0.0))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(arrival, grpc.RpcError):
            raise arrival
        return arrival

    def leave(self) -> None:
        """Have the server stop the answer, unless it is complete. Returns at once; calling it twice is harmless."""
        if self._left or self._over.is_set():
            return
        self._left = True
        self._channel.start(_stop, self._channel.stub, self._model, self._id, self._call)


# The threads know neither the StreamCall nor its consumer: a stream that is dropped must be left.
def _read_out(call: Any, arrivals: queue.SimpleQueue[Any], over: threading.Event) -> None:
    try:
        for response in call:
            if response.error_message or any(output.name == "log_prob" for output in response.infer_response.outputs):
                over.set()
            arrivals.put(response)
        arrivals.put(None)
    except grpc.RpcError as error:
        arrivals.put(error)
    finally:
        over.set()


def _stop(stub: Any, model: str, stream_id: str, call: Any) -> None:
    message = infer_message_from_tensors(model, stop_tensors())
    message.id = stop_id(stream_id)
    try:
        responses = list(stub.ModelStreamInfer(iter([message]), timeout=STOP_TIMEOUT_S))
    except (grpc.RpcError, ValueError):  # ValueError: the connection is closed
        call.cancel()
    else:
        if any(response.error_message for response in responses):
            call.cancel()
