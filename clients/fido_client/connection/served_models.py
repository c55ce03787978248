"""What a server serves: its readers' names, and one model's inputs and limits. Sends two kinds of small requests, never a question."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tritonclient.grpc import service_pb2, service_pb2_grpc

from .endpoint import Endpoint

TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One model's configuration.

    Attributes:
        name: Its name.
        inputs: The names of its inputs.
        is_streaming: Whether it sends an answer in parts, which only streaming requests can receive.
        limits: Its whole-number parameters, such as max_passages; empty if the server sends none.
    """

    name: str
    inputs: frozenset[str]
    is_streaming: bool
    limits: Mapping[str, int]

    @property
    def is_reader(self) -> bool:
        """Whether it takes a question and passages."""
        return {"question", "passages"} <= self.inputs


def reader_names(endpoint: Endpoint) -> tuple[str, ...]:
    """The names of the readers that the server has, sorted, without their encoders and streaming models.

    Raises:
        grpc.RpcError: If the server does not answer.
    """
    with _stub(endpoint) as stub:
        index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=TIMEOUT_S)
    names = {model.name for model in index.models if model.state in ("READY", "")}
    return tuple(
        sorted(name for name in names if not any(name.endswith(end) and name[: -len(end)] in names for end in ("_encoder", "_stream")))
    )


def served_model(endpoint: Endpoint) -> ServedModel:
    """The configuration of the endpoint's unary model.

    Raises:
        grpc.RpcError: If the server does not answer, or does not have the model.
    """
    with _stub(endpoint) as stub:
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name=endpoint.model), timeout=TIMEOUT_S).config
    values = {name: parameter.string_value for name, parameter in config.parameters.items()}
    return ServedModel(
        name=endpoint.model,
        inputs=frozenset(tensor.name for tensor in config.input),
        is_streaming=config.model_transaction_policy.decoupled,
        limits={name: int(value) for name, value in values.items() if value.isascii() and value.isdigit()},
    )


@contextlib.contextmanager
def _stub(endpoint: Endpoint) -> Iterator[Any]:
    with endpoint.channel(endpoint.credentials()) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)
