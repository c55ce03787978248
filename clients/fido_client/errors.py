"""The client's errors: exceptions of gRPC and tritonclient -> ReaderError and its subclasses.

Every error keeps the server's message in `message`; `str(error)` adds the model, the address and what to do.
"""

from __future__ import annotations

import grpc
from tritonclient.utils import InferenceServerException


class ReaderError(RuntimeError):
    """A question was not answered.

    Attributes:
        message: The server's message, or the client's if nothing was sent.
        model: The model's name in Triton.
        status: The gRPC status ("INTERNAL", "DEADLINE_EXCEEDED", ...); None if the server sent none or nothing was sent.
    """

    def __init__(self, text: str, *, message: str | None = None, model: str | None = None, status: str | None = None) -> None:
        super().__init__(text)
        self.message = text if message is None else message
        self.model = model
        self.status = status


class RequestRefused(ReaderError):  # noqa: N818 - the caller reads it as what happened
    """The request is invalid: sending it again fails again. `status` is None if the client refused it before sending."""


class ReaderTimeout(ReaderError):  # noqa: N818
    """No answer within the request's time-out; the request was cancelled on the server."""


class ReaderUnavailable(ReaderError):  # noqa: N818
    """No server responds at the address, or it does not serve this model now."""


# NOT_FOUND means an unknown model in Triton: changing the question does not help.
# What Triton and the readers say, under other statuses or inside a stream without one, while a server starts, is full or shuts down, or has
# lost a model's process, which ends it and has it brought back.
_TEMPORARY = (
    "is not healthy",  # Stub process 'fido_encoder_0_0' is not healthy.
    "has no available versions",
    "has stopped accepting new inference requests",
    "Server not ready",
    "the server is shutting down",
    "in flight and no more may",
)
_CLASS_OF_STATUS: dict[str | None, type[ReaderError]] = {
    "INVALID_ARGUMENT": RequestRefused,
    "OUT_OF_RANGE": RequestRefused,
    "DEADLINE_EXCEEDED": ReaderTimeout,
    "UNAVAILABLE": ReaderUnavailable,
    "NOT_FOUND": ReaderUnavailable,
}


def error_from_exception(exception: Exception, *, model: str, url: str, timeout_s: float, hint: str | None = None) -> ReaderError:
    """The ReaderError for an `InferenceServerException` or a `grpc.RpcError`.

    Args:
        exception: What tritonclient or gRPC raised.
        model: The model's name in Triton.
        url: The server's address.
        timeout_s: The request's time-out in seconds.
        hint: Why the reader is not available, and what to do, if that is known.
    """
    status, message = status_and_message(exception)
    kind = _CLASS_OF_STATUS.get(status, ReaderError)
    where = f"{model} at {url}"
    code = f" ({status})" if status else ""
    if kind is RequestRefused:
        text = f"{where} refused the request{code}: {message}"
    elif kind is ReaderTimeout:
        text = f"{where} did not answer within {timeout_s:g} s{code}: {message}; allow more with timeout_s, or send less"
    elif kind is ReaderUnavailable:
        text = f"{where} is not available{code}: {_reason(status, message, hint)}"
    else:
        text = f"{where} failed{code}: {message}"
    return kind(text, message=message, model=model, status=status)


def status_and_message(exception: Exception) -> tuple[str | None, str]:
    """The gRPC status and the server's message; the status is None for most errors inside a stream, which Triton sends without one.

    The status is UNAVAILABLE wherever the message says that the server starts, is full, shuts down or is broken: Triton has no one status
    for that.
    """
    if isinstance(exception, grpc.RpcError):
        status, message = exception.code().name, exception.details() or ""
    elif isinstance(exception, InferenceServerException):
        status, message = (exception.status() or "").removeprefix("StatusCode.") or None, exception.message() or ""
    else:
        raise TypeError(f"wanted a grpc.RpcError or an InferenceServerException, got {type(exception).__name__}") from exception
    return ("UNAVAILABLE" if any(words in message for words in _TEMPORARY) else status), message


def _reason(status: str | None, message: str, hint: str | None) -> str:
    """Why a reader is not available: the server's message with a hint. The cause of a failed connection replaces gRPC's message."""
    if status == "NOT_FOUND":
        return f"{message}; {hint or 'check the name of the model, and that the server has loaded it'}"
    return hint or message
