"""A stand-in for Triton's Python backend, for unit tests of the models. test_server.py tests them in the real one."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, array: np.ndarray):
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array

    def is_cpu(self) -> bool:
        return True


class TritonError(Exception):
    INTERNAL, INVALID_ARG, CANCELLED, UNAVAILABLE = "INTERNAL", "INVALID_ARG", "CANCELLED", "UNAVAILABLE"

    def __init__(self, message: str, code: str = INTERNAL):
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None):
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Metric:
    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, by: float) -> None:
        self.value += by


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    every: dict[str, MetricFamily] = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, kind: str):
        assert name not in self.every, f"Triton refuses a second family called {name}"
        self.kind = kind
        self.metrics: dict[tuple[tuple[str, str], ...], Metric] = {}
        self.every[name] = self

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802
        return self.metrics.setdefault(tuple(sorted(labels.items())), Metric())


class Sender:
    def __init__(self) -> None:
        self.responses: list[tuple[InferenceResponse | None, int]] = []
        self.cancelled: bool | Exception = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        self.responses.append((response, flags))

    def is_cancelled(self) -> bool:
        if isinstance(self.cancelled, Exception):
            raise self.cancelled
        return self.cancelled


class Request:
    def __init__(
        self,
        tensors: dict[str, np.ndarray],
        request_id: str = "",
        timeout_us: int = 0,
        outputs: list[str] | None = None,
        parameters: str | bytes = "{}",
    ):
        self._parameters = parameters
        self.tensors, self._id, self._timeout_us, self._outputs = tensors, request_id, timeout_us, outputs or []
        self.sender = Sender()

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return self._parameters if isinstance(self._parameters, str) else self._parameters.decode()  # as pybind11 decodes it

    def timeout(self) -> int:
        return self._timeout_us

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def get_response_sender(self) -> Sender:
        return self.sender


class Logger:
    lines: list[str] = []  # noqa: RUF012

    @classmethod
    def log_info(cls, line: str) -> None:
        cls.lines.append(line)

    log_warn = log_error = log_info


def module() -> types.ModuleType:
    """The module as Triton gives it to a model."""
    made = types.ModuleType("triton_python_backend_utils")
    MetricFamily.every = {}
    Logger.lines = []
    named: dict[str, Any] = {c.__name__: c for c in (Tensor, TritonError, InferenceResponse, MetricFamily, Logger)}
    vars(made).update(named)
    made.TritonModelException = type("TritonModelException", (Exception,), {})  # type: ignore[attr-defined]
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    made.get_input_tensor_by_name = lambda request, name: (  # type: ignore[attr-defined]
        Tensor(name, request.tensors[name]) if name in request.tensors else None
    )
    return made


def forget_models() -> None:
    """Drop the models' modules, so that the next import binds the present stand-in."""
    for name in [name for name in sys.modules if name.startswith("serving.triton.") and not name.endswith(".shutdown")]:
        del sys.modules[name]
