"""The errors of the client, and their making from what gRPC and tritonclient raise.

Every error keeps the server's own words in `message`; `str(error)` adds which model, where, and what to do.
"""

import grpc
from tritonclient.utils import InferenceServerException


class ReaderError(RuntimeError):
    """A question that got no answer.

    Attributes:
        message: The server's own words, or what the client found wrong before sending.
        model: The model that was asked, as Triton knows it.
        status: The gRPC status ("INTERNAL", "DEADLINE_EXCEEDED", ...); None where the server gave none or nothing was sent.
    """

    def __init__(self, text: str, *, message: str | None = None, model: str | None = None, status: str | None = None) -> None:
        super().__init__(text)
        self.message = text if message is None else message
        self.model = model
        self.status = status


class RequestRefused(ReaderError):  # noqa: N818 - the caller reads it as what happened
    """The request itself is at fault: sending it again will fail again. `status` is None when the client refused it before sending."""


class ReaderTimeout(ReaderError):  # noqa: N818
    """No answer within the request's time-out; the server was told to drop the request."""


class ReaderUnavailable(ReaderError):  # noqa: N818
    """Nobody answers at the address, or the server there does not serve this model (now)."""


# Triton answers NOT_FOUND for a model it has never heard of: whoever asks cannot mend that by changing the question.
_CLASS_OF_STATUS: dict[str | None, type[ReaderError]] = {
    "INVALID_ARGUMENT": RequestRefused,
    "OUT_OF_RANGE": RequestRefused,
    "DEADLINE_EXCEEDED": ReaderTimeout,
    "UNAVAILABLE": ReaderUnavailable,
    "NOT_FOUND": ReaderUnavailable,
}


def error_from_exception(exception: Exception, *, model: str, url: str, timeout_s: float) -> ReaderError:
    """The ReaderError that says what an `InferenceServerException` or a `grpc.RpcError` means.

    Args:
        exception: What tritonclient or gRPC raised.
        model: The model that was asked.
        url: Where it was asked.
        timeout_s: The time-out that the request ran under.
    """
    if isinstance(exception, grpc.RpcError):
        status, message = exception.code().name, exception.details() or ""
    elif isinstance(exception, InferenceServerException):
        # "StatusCode.INTERNAL"; None for an error inside a stream, where Triton sends words alone
        status, message = (exception.status() or "").removeprefix("StatusCode.") or None, exception.message() or ""
    else:
        raise TypeError(f"wanted a grpc.RpcError or an InferenceServerException, got {type(exception).__name__}") from exception
    kind = _CLASS_OF_STATUS.get(status, ReaderError)
    where = f"{model} at {url}"
    code = f" ({status})" if status else ""
    if kind is RequestRefused:
        text = f"{where} refused the request{code}: {message}"
    elif kind is ReaderTimeout:
        text = f"{where} did not answer within {timeout_s:g} s{code}: {message}; allow more with timeout_s, or send less"
    elif kind is ReaderUnavailable:
        text = f"{where} is not available{code}: {message}{_hint(status, message)}"
    else:
        text = f"{where} failed{code}: {message}"
    return kind(text, message=message, model=model, status=status)


def _hint(status: str | None, message: str) -> str:
    """What to look at, where the server's words do not say it: a full queue, for one, explains itself."""
    if status == "NOT_FOUND":
        return "; check the model's name, and that the server has loaded it"
    return "; is the server running there, and is this its gRPC port?" if "failed to connect" in message else ""
