"""Asks a running server over gRPC or raw HTTP, and judges what comes back."""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Iterable
from typing import Any

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client.answer import StreamAssembler, answer_from_result
from fido_client.errors import ReaderError
from serving.launcher.server import LOOPBACK
from tests.stress.mutants.http import request

from .questions import Case
from .tally import Verdict

TIMEOUT_S = 30.0  # whatever has not come by then has been lost
CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
SERVICE = "/inference.GRPCInferenceService/"
Outcome = tuple[Verdict, str]


def of_error(error: grpc.RpcError, *, hasty: bool = False) -> Outcome:
    """What an error means: a deadline that nobody set on purpose is a lost answer, everything else tells the caller."""
    what = f"{error.code().name}: {(error.details() or '')[:200]}"
    lost = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not hasty
    return (Verdict.LOST if lost else Verdict.TOLD), what


class Asker:
    """A connection to the server; threads may share it."""

    def __init__(self, grpc_url: str, http_port: int):
        self.http_port = http_port
        self._channel = grpc.insecure_channel(grpc_url, CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._raw_infer = self._channel.unary_unary(f"{SERVICE}ModelInfer")
        self._raw_stream = self._channel.stream_stream(f"{SERVICE}ModelStreamInfer")

    def close(self) -> None:
        """Break the connection and whatever is in flight on it."""
        self._channel.close()

    def start(self, case: Case, model: str, timeout_s: float = TIMEOUT_S, timeout_us: int = 0) -> Any:
        """Send a unary request and do not wait; `timeout_us` is the request's own, which Triton passes on to the model."""
        message = case.message(model)
        if timeout_us:
            message.parameters["timeout"].int64_param = timeout_us
        return self._stub.ModelInfer.future(message, timeout=timeout_s)

    def start_stream(self, case: Case, model: str, timeout_s: float = TIMEOUT_S, timeout_us: int = 0) -> Any:
        """Open a stream and do not read it."""
        message = case.message(model)
        if timeout_us:
            message.parameters["timeout"].int64_param = timeout_us
        return self._stub.ModelStreamInfer(iter([message]), timeout=timeout_s)

    def ask(self, case: Case, model: str, timeout_s: float = TIMEOUT_S, timeout_us: int = 0, *, hasty: bool = False) -> Outcome:
        """Ask and wait; a model called *_stream is read piece by piece."""
        if model.endswith("_stream"):
            return judged_stream(self.start_stream(case, model, timeout_s, timeout_us), case, model, hasty=hasty)
        return judged(self.start(case, model, timeout_s, timeout_us), case, model, hasty=hasty)

    def send_raw(self, content: bytes, model: str, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
        """Send bytes as if they were a request to a model: whether it was answered, and what was said.

        Raises:
            TimeoutError: if nothing came.
        """
        try:
            if not model.endswith("_stream"):
                self._raw_infer(content, timeout=timeout_s)
                return True, "answered"
            responses = [service_pb2.ModelStreamInferResponse.FromString(r) for r in self._raw_stream(iter([content]), timeout=timeout_s)]
        except grpc.RpcError as error:
            verdict, what = of_error(error)
            if verdict is Verdict.LOST:
                raise TimeoutError(what) from error
            return False, what
        errors = [response.error_message for response in responses if response.error_message]
        if not responses:
            return False, "the stream was ended"  # as Triton does with bytes that are no message
        return not errors, errors[0] if errors else "answered"


def judged(call: Any, case: Case, model: str, *, hasty: bool = False) -> Outcome:
    """Wait for a unary call and judge it."""
    try:
        result = InferResult(call.result())
    except grpc.FutureCancelledError:
        return Verdict.TOLD, "cancelled"
    except grpc.RpcError as error:
        return of_error(error, hasty=hasty)
    try:
        return judged_answer(answer_from_result(result, model=model, latency_s=0), case)
    except ReaderError as error:
        return Verdict.WRONG, str(error)


def judged_stream(responses: Iterable[Any], case: Case, model: str, *, hasty: bool = False) -> Outcome:
    """Read a stream to its end, also behind an error, and judge it."""
    assembler = StreamAssembler(model)
    try:
        for response in responses:
            if response.error_message:
                for _ in responses:
                    pass
                return Verdict.TOLD, response.error_message[:200]
            assembler.feed(InferResult(response.infer_response), 0)
    except grpc.RpcError as error:
        if not assembler.is_complete:
            return of_error(error, hasty=hasty)
    try:
        return judged_answer(assembler.finish(), case)
    except ReaderError as error:
        return Verdict.LOST, str(error)[:200]


def judged_answer(answer: Any, case: Case) -> Outcome:
    """Compare an answer with the reference."""
    if case.fits(answer.text, answer.tokens, answer.log_prob, answer.answers):
        return Verdict.RIGHT, ""
    wanted = case.text, case.tokens, case.log_prob, case.answers
    got = answer.text, answer.tokens, answer.log_prob, answer.answers
    return Verdict.WRONG, f"wanted {wanted!r}, got {got!r}"


def exchange(port: int, content: bytes, timeout_s: float = TIMEOUT_S, patience_s: float | None = None) -> tuple[int | None, bytes]:
    """Send bytes to a port and read: status and body, or None where the connection was closed without a response.

    Args:
        port: of the HTTP endpoint.
        content: the whole request.
        timeout_s: how long an answer may take.
        patience_s: after so long without a word our half of the connection is ended, since the server may be waiting for the rest of a
            request that has none; None never does, because Triton drops a good request too when that happens.

    Raises:
        TimeoutError: if neither came.
    """
    with socket.create_connection((LOOPBACK, port), timeout=timeout_s) as connection:
        response = None
        try:
            connection.sendall(content)
            if patience_s is not None and not select.select([connection], [], [], patience_s)[0]:
                connection.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return response.status, response.read()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException):
            return (response.status if response and response.headers else None), b""


def ask_http(port: int, case: Case, model: str, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Ask through `generate` or `generate_stream`, and judge."""
    endpoint = "generate_stream" if model.endswith("_stream") else "generate"
    try:
        status, body = exchange(port, request(f"/v2/models/{model}/{endpoint}", json.dumps(case.body()).encode()), timeout_s)
    except TimeoutError:
        return Verdict.LOST, f"HTTP: nothing within {timeout_s:.0f} s"
    except OSError as error:
        return Verdict.TOLD, f"HTTP: {error}"
    if status != 200:
        return Verdict.TOLD, f"HTTP {status}: {body[:200]!r}"
    return judged_http(body, case)


def judged_http(body: bytes, case: Case) -> Outcome:
    """Judge the body of a good response: one JSON object, or server-sent events."""
    text = body.decode()
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")] or [text]
    try:
        events = [json.loads(line) for line in lines]
    except ValueError:
        return Verdict.LOST, f"HTTP: broken off in {text[-80:]!r}"
    if told := [event["error"] for event in events if "error" in event]:
        return Verdict.TOLD, str(told[0])[:200]
    if "tokens" not in events[-1]:
        return Verdict.LOST, "HTTP: the stream ended without its totals"
    answer = "".join(event["answer"] for event in events)
    answers = events[-1].get("answers", [])
    answers = tuple(answers) if isinstance(answers, list) else (answers,)  # Triton writes a list of one as what is in it
    if case.fits(answer, events[-1]["tokens"], events[-1]["log_prob"], answers):
        return Verdict.RIGHT, ""
    return Verdict.WRONG, f"HTTP: wanted {case.text!r}, {case.answers!r}, got {answer!r}, {answers!r}"
