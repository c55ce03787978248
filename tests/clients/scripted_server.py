"""A gRPC server in this process that speaks Triton's protocol and answers by script: what Triton would do, without Triton.

Tests set `on_infer` and `on_stream`; a script gets the request decoded and gives outputs by name, or raises Refusal.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

Outputs = dict[str, Any]
WHOLE = {"answer": "Paris", "log_prob": -0.5, "tokens": 3}


class Refusal(Exception):  # noqa: N818
    """The error that a script answers with; without a code its words go into the stream, as Triton does when not asked for codes."""

    def __init__(self, message: str, code: grpc.StatusCode | None = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.message, self.code = message, code


@dataclasses.dataclass(frozen=True)
class Received:
    model: str
    tensors: dict[str, list[Any]]
    datatypes: dict[str, str]
    metadata: dict[str, str]
    id: str = ""

    @property
    def question(self) -> str:
        return self.tensors["question"][0]


Script = Callable[[Received, grpc.ServicerContext], Any]


class ScriptedServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.on_infer: Script = lambda received, context: WHOLE
        self.on_stream: Script = lambda received, context: iter([{"answer": "Pa"}, {"answer": "ris"}, WHOLE | {"answer": ""}])
        self.models: dict[str, dict[str, int]] | None = None  # readers and their limits; None: the server does not say
        self.received: list[Received] = []
        self.cancelled = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        self.knows_stops = True
        self._ends: dict[str, threading.Event] = {}
        self.streams_read_out = threading.Semaphore(0)
        self.end_of_refused_stream_s = 0.0
        self._lock = threading.Lock()
        self._in_flight = 0
        self.most_in_flight = 0
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(32), options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.stop(None).wait()

    def wait_until_cancelled(self, context: grpc.ServicerContext) -> Outputs:
        """For scripts: never answers, and notes that the client gave the request up."""
        ended = threading.Event()
        if not context.add_callback(ended.set) or ended.wait(10):
            self.cancelled.release()
        return WHOLE

    def wait_until_stopped(self, received: Received) -> Any:
        """For scripts: answers no more until the client has the stream stopped, then ends it as a reader does."""
        if self._end_of(received.id).wait(10):
            self.stopped.release()
        raise Refusal("stopped by the client", None)

    def _end_of(self, stream_id: str) -> threading.Event:
        with self._lock:
            return self._ends.setdefault(stream_id, threading.Event())

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == "fido")

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        names = [name + end for name in self.models or {} for end in ("", "_encoder", "_stream")]
        return service_pb2.RepositoryIndexResponse(
            models=[service_pb2.RepositoryIndexResponse.ModelIndex(name=name, state="READY") for name in names]
        )

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if self.models is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        reader = next((name for name in self.models or {} if request.name in (name, f"{name}_stream", f"{name}_encoder")), None)
        if reader is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = service_pb2.ModelConfigResponse()
        inputs = ("input_ids",) if request.name.endswith("_encoder") else ("question", "passages")
        for name in inputs:
            response.config.input.add(name=name)
        response.config.model_transaction_policy.decoupled = request.name.endswith("_stream")
        for name, limit in (self.models or {})[str(reader)].items():
            response.config.parameters[name].string_value = str(limit)
        return response

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        received = self._receive(request, context)
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return _response(request, self.on_infer(received, context))
        except Refusal as refusal:
            context.abort(refusal.code, refusal.message)
        finally:
            with self._lock:
                self._in_flight -= 1

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        # like Triton, the stream ends when the client has no more requests and all of them are answered
        for request in requests:
            if self.knows_stops and request.id.startswith("stop:"):
                self._end_of(request.id.removeprefix("stop:")).set()
                yield service_pb2.ModelStreamInferResponse(infer_response=_response(request, {}))
                continue
            try:
                for outputs in self.on_stream(self._receive(request, context), context):
                    yield service_pb2.ModelStreamInferResponse(infer_response=_response(request, outputs))
            except Refusal as refusal:
                if refusal.code is not None:
                    context.abort(refusal.code, refusal.message)
                yield service_pb2.ModelStreamInferResponse(error_message=refusal.message)
                time.sleep(self.end_of_refused_stream_s)
        self.streams_read_out.release()  # not reached where the client cancels

    def _receive(self, request: Any, context: grpc.ServicerContext) -> Received:
        tensors, datatypes = {}, {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if tensor.datatype == "BYTES":
                values = [value.decode("utf-8") for value in deserialize_bytes_tensor(raw)]
            else:
                values = np.frombuffer(raw, {"INT32": np.int32, "FP32": np.float32}[tensor.datatype]).tolist()
            assert list(tensor.shape) == [len(values)]
            tensors[tensor.name], datatypes[tensor.name] = values, tensor.datatype
        received = Received(request.model_name, tensors, datatypes, dict(context.invocation_metadata()), request.id)
        with self._lock:
            self.received.append(received)
        return received


def _response(request: Any, outputs: Outputs) -> Any:
    response = service_pb2.ModelInferResponse(model_name=request.model_name)
    for name, value in outputs.items():
        if isinstance(value, str | bytes) or (isinstance(value, list) and value and isinstance(value[0], str)):
            texts = value if isinstance(value, list) else [value]
            datatype, raw = "BYTES", serialize_byte_tensor(np.array(texts, np.object_)).item()
        elif isinstance(value, float | list):
            datatype, raw = "FP32", np.array(value, np.float32).tobytes()
        else:
            datatype, raw = "INT32", np.array([value], np.int32).tobytes()
        response.outputs.add(name=name, datatype=datatype, shape=[len(value) if isinstance(value, list) else 1])
        response.raw_output_contents.append(raw)
    if not outputs:
        response.parameters["triton_final_response"].bool_param = True
    return response
