"""Triton's HTTP endpoint in the place of gRPC's: the same requests and results, and streams that a client may simply hang up on.

In: tensors of a request. Out: InferResults and errors as tritonclient's gRPC client gives them, so that the code above does not differ.
Only the standard library is used. A request has a connection of its own; connections are used again.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

from .endpoint import Endpoint, grpc_timeout_s
from .served_models import TIMEOUT_S, ServedModel
from .stop import deadline_exceeded, new_stream_id, stop_id, stop_tensors

# A reader's outputs in a streamed event, which does not say their types.
_STREAMED_TYPES = {"answer": "BYTES", "log_prob": "FP32", "tokens": "INT32", "passage_scores": "FP32", "token_log_probs": "FP32"}
_STATUS = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE"}
_MAX_THREADS = 256  # of requests in flight at once
_MICROSECONDS = 1_000_000


class HttpTransport:
    """Requests to one reader over HTTP; safe to share between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._tls = _tls_context(endpoint) if endpoint.ssl else None
        self._idle: list[http.client.HTTPConnection] = []
        self._in_flight: set[str] = set()  # ids of unary requests
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="http")

    def is_ready(self, timeout_s: float) -> bool:
        """Whether the unary model is ready."""
        try:
            with self._exchange("GET", f"{self._path()}/ready", None, timeout_s):
                return True
        except InferenceServerException:
            return False

    def served_model(self) -> ServedModel:
        """The configuration of the unary model.

        Raises:
            InferenceServerException: If the server does not answer, or does not have the model.
        """
        with self._exchange("GET", f"{self._path()}/config", None, TIMEOUT_S) as response:
            config = json.loads(response.read())
        values = {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
        return ServedModel(
            name=self._endpoint.model,
            inputs=frozenset(tensor["name"] for tensor in config["input"]),
            is_streaming=bool(config.get("model_transaction_policy", {}).get("decoupled")),
            limits={name: int(value) for name, value in values.items() if value.isascii() and value.isdigit()},
        )

    def infer(self, tensors: Mapping[str, np.ndarray], timeout_s: float, request_id: str | None = None) -> InferResult:
        """One request and its result.

        The request carries its time-out, so that the server stops an answer that nobody waits for: a hang-up does not reach it.

        Raises:
            InferenceServerException: As tritonclient's gRPC client.
        """
        request_id = request_id or new_stream_id()
        with self._lock:
            self._in_flight.add(request_id)
        try:
            return self._infer(tensors, timeout_s, request_id)
        finally:
            with self._lock:
                self._in_flight.discard(request_id)

    def _infer(self, tensors: Mapping[str, np.ndarray], timeout_s: float, request_id: str) -> InferResult:
        parameters = {} if grpc_timeout_s(timeout_s) is None else {"timeout": max(int(timeout_s * _MICROSECONDS), 1)}
        body = {"id": request_id, "parameters": parameters, "inputs": [_input(name, array) for name, array in tensors.items()]}
        with self._exchange("POST", f"{self._path()}/infer", body, timeout_s) as response:
            found = json.loads(response.read())
        message = service_pb2.ModelInferResponse(model_name=self._endpoint.model)
        for output in found["outputs"]:
            _add_output(message, output["name"], output["datatype"], output["shape"], output["data"])
        return InferResult(message)

    def submit(self, tensors: Mapping[str, np.ndarray], timeout_s: float, arrived: Callable[[Any, Any], None]) -> HttpCall:
        """`infer` on a thread; `arrived` gets the result or the error, the other one None."""
        return HttpCall(self, tensors, timeout_s, arrived, self._pool)

    def open_stream(self, tensors: Mapping[str, np.ndarray], deadline_s: float, start_s: float) -> HttpStream:
        """Send a streaming request; `start_s`, of time.perf_counter, is when its deadline began."""
        return HttpStream(self._connection(), self._endpoint.streaming_model, tensors, start_s + deadline_s)

    def stop(self, request_id: str) -> None:
        """Have the server stop a request. Nothing is raised if it cannot be reached."""
        with contextlib.suppress(InferenceServerException):
            self._infer(stop_tensors(), TIMEOUT_S, stop_id(request_id))

    def stop_later(self, *request_ids: str) -> None:
        """`stop` of each, on a thread of its own: all others may wait for answers."""
        threading.Thread(target=self._stop_all, args=(request_ids,), name="stop", daemon=True).start()

    def _stop_all(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.stop(request_id)

    def close(self) -> None:
        """Stop the unary requests in flight, and close the connections."""
        self._closed = True
        self._pool.shutdown(wait=False)
        with self._lock:
            idle, self._idle = self._idle, []
            in_flight = sorted(self._in_flight)
        for connection in idle:
            connection.close()
        if in_flight:
            self.stop_later(*in_flight)

    def _path(self) -> str:
        return f"/v2/models/{self._endpoint.model}"

    @contextlib.contextmanager
    def _exchange(self, method: str, path: str, body: Any, timeout_s: float) -> Iterator[http.client.HTTPResponse]:
        """A response with status 200. Its connection is kept if it was read to its end."""
        connection, response = self._send(method, path, body, time.perf_counter() + timeout_s)
        try:
            with _as_server_errors():
                yield response
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if response.isclosed() and not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _send(self, method: str, path: str, body: Any, end_s: float) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request that must have its response at `end_s` of time.perf_counter; a connection and its response with status 200.

        Raises:
            InferenceServerException: If there is no connection in time, or the status is another.
        """
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            was_idle = connection is not None
            connection = connection or self._connection()
            try:
                with _as_server_errors():
                    _request(connection, method, path, body, end_s)
                    return connection, _response_of(connection)
            except InferenceServerException as error:
                connection.close()
                # the server may have closed an idle connection: nobody has read the request
                if not (was_idle and isinstance(error.__cause__, (ConnectionError, http.client.BadStatusLine))):
                    raise

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._endpoint.host_and_port() or ("", 0)
        if self._tls is not None:
            return http.client.HTTPSConnection(host, port, context=self._tls)
        return http.client.HTTPConnection(host, port)


class HttpCall:
    """A unary request in flight."""

    def __init__(
        self,
        transport: HttpTransport,
        tensors: Mapping[str, np.ndarray],
        timeout_s: float,
        arrived: Callable[[Any, Any], None],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._transport, self._id, self._over = transport, new_stream_id(), threading.Event()
        pool.submit(self._run, tensors, timeout_s, arrived)

    def cancel(self) -> None:
        """Have the server stop it."""
        if not self._over.is_set():
            self._transport.stop_later(self._id)

    def _run(self, tensors: Mapping[str, np.ndarray], timeout_s: float, arrived: Callable[[Any, Any], None]) -> None:
        try:
            result = self._transport.infer(tensors, timeout_s, self._id)
        except InferenceServerException as error:
            self._over.set()
            arrived(None, error)
        else:
            self._over.set()
            arrived(result, None)


class HttpStream:
    """One stream in flight: server-sent events. To leave it is to hang up, which Triton takes well and passes on to the reader."""

    def __init__(self, connection: http.client.HTTPConnection, model: str, tensors: Mapping[str, np.ndarray], end_s: float) -> None:
        self._connection, self._end_s = connection, end_s
        self._response: http.client.HTTPResponse | None = None
        self._failure: InferenceServerException | None = None
        body = {name: _json_values(array) for name, array in tensors.items()}
        scalars = {name: values[0] for name, values in body.items() if name not in ("passages", "titles")}
        try:
            with _as_server_errors():
                _request(connection, "POST", f"/v2/models/{model}/generate_stream", {**body, **scalars}, end_s)
        except InferenceServerException as error:  # said to who reads, as by gRPC
            self._failure = error

    def next_response(self) -> service_pb2.ModelStreamInferResponse | None:
        """The next response; None at the end of the stream.

        Raises:
            InferenceServerException: If the connection has failed, or the deadline has passed.
        """
        if self._failure is not None:
            raise self._failure
        while True:
            with _as_server_errors():
                _set_timeout(self._connection, self._end_s)
                self._response = self._response or _response_of(self._connection)
                line = self._response.readline()
            if not line:
                return None
            if line.startswith(b"data:"):
                return _streamed(json.loads(line[len(b"data:") :]))

    def leave(self) -> None:
        """Hang up. Calling it twice is harmless."""
        if self._response is not None:
            self._response.close()
        self._connection.close()


def _request(connection: http.client.HTTPConnection, method: str, path: str, body: Any, end_s: float) -> None:
    content = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8")
    _set_timeout(connection, end_s)
    connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})


def _response_of(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    """The response, if its status is 200.

    Raises:
        InferenceServerException: If it is another.
    """
    response = connection.getresponse()
    if response.status != 200:
        raise _error_of(response.status, response.read())
    return response


def _set_timeout(connection: http.client.HTTPConnection, end_s: float) -> None:
    """Have what is read next end at `end_s`.

    Raises:
        TimeoutError: If that has passed.
    """
    left_s = end_s - time.perf_counter()
    if left_s <= 0:
        raise TimeoutError
    connection.timeout = grpc_timeout_s(left_s)
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)


@contextlib.contextmanager
def _as_server_errors() -> Iterator[None]:
    """Turn errors of the connection into those of tritonclient."""
    try:
        yield
    except (TimeoutError, socket.timeout) as error:  # two until Python 3.10
        raise deadline_exceeded() from error
    except (OSError, http.client.HTTPException) as error:
        raise InferenceServerException(str(error) or type(error).__name__, status="StatusCode.UNAVAILABLE") from error


def _error_of(status: int, content: bytes) -> InferenceServerException:
    try:
        message = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        message = content.decode("utf-8", errors="replace") or f"HTTP status {status}"
    name = _STATUS.get(status, "INTERNAL")
    if "timeout of" in message and "passed before" in message:  # the reader's own words: Triton's HTTP endpoint has no status for it
        name = "DEADLINE_EXCEEDED"
    return InferenceServerException(message, status=f"StatusCode.{name}")


def _input(name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": name, "datatype": np_to_triton_dtype(array.dtype), "shape": list(array.shape), "data": _json_values(array)}


def _json_values(array: np.ndarray) -> list[Any]:
    return [value.decode("utf-8") if isinstance(value, bytes) else value for value in array.tolist()]


def _streamed(event: dict[str, Any]) -> service_pb2.ModelStreamInferResponse:
    if "error" in event:
        return service_pb2.ModelStreamInferResponse(error_message=str(event["error"]))
    response = service_pb2.ModelStreamInferResponse()
    for name, datatype in _STREAMED_TYPES.items():
        if name in event:
            values = event[name] if isinstance(event[name], list) else [event[name]]
            _add_output(response.infer_response, name, datatype, [len(values)], values)
    return response


def _add_output(message: service_pb2.ModelInferResponse, name: str, datatype: str, shape: list[int], values: list[Any]) -> None:
    message.outputs.add(name=name, datatype=datatype, shape=shape)
    if datatype == "BYTES":
        array = np.array([value.encode("utf-8") for value in values], dtype=np.object_)
        message.raw_output_contents.append(serialize_byte_tensor(array).item())
    else:
        message.raw_output_contents.append(np.array(values, triton_to_np_dtype(datatype)).tobytes())


def _tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=endpoint.root_certificates)
    if endpoint.certificate_chain:
        context.load_cert_chain(endpoint.certificate_chain, endpoint.private_key)
    return context
