"""A cancelled stream must not stop all others. Triton's own test hook holds a stream's lock for a while at every response: without
serving/launcher/preload/stream_locks.c the first stream that is cancelled then is the last one that is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from export.repository import repository_from_engines
from fido_client.errors import ReaderError
from fido_client.reader_client import ReaderClient
from fido_client.request import ReaderRequest, infer_message_from_tensors, tensors_from_request
from serving.contract.limits import Limits
from serving.launcher import environment
from serving.launcher.environment import STREAM_LOCKS
from serving.launcher.server import TritonServer, models_of

pytestmark = [pytest.mark.server, pytest.mark.skipif(not STREAM_LOCKS.is_file(), reason="there was no C compiler at `make setup`")]
CANCELLED, TOKENS = 5, 24


@pytest.fixture
def server(engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    monkeypatch.setenv("TRITONSERVER_DELAY_GRPC_RESPONSE", "30")
    monkeypatch.setattr(environment, "STREAM_LOCKS", request.param)
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    with TritonServer(models_of(["fido"], stream=True), tmp_path / "repository", drain_timeout_s=1.0) as server:
        yield server


def cancel_in_mid_answer(server: TritonServer) -> None:
    """Cancel a stream after its first response, while more are on their way. Our client does not cancel, so this is a plain gRPC stub."""
    request = ReaderRequest("w1", ["w2"], max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    message = infer_message_from_tensors("fido_stream", tensors_from_request(request))
    with grpc.insecure_channel(server.grpc_url, [("grpc.enable_http_proxy", 0)]) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([message]), timeout=20)
        next(call)
        call.cancel()


@pytest.mark.parametrize("server", [STREAM_LOCKS], indirect=True, ids=["with it"])
def test_streams_are_served_after_others_were_cancelled(server: TritonServer) -> None:
    with ReaderClient(server.grpc_url, "fido_stream", timeout_s=20) as client:
        for _ in range(CANCELLED):
            cancel_in_mid_answer(server)
            assert client.stream("w1", ["w2"], max_new_tokens=4, min_new_tokens=4).read_to_end().tokens == 4


@pytest.mark.parametrize("server", [Path("/nowhere")], indirect=True, ids=["without it"])
def test_triton_still_needs_it(server: TritonServer) -> None:
    """If this fails, Triton has been mended: stream_locks.c can go."""
    with ReaderClient(server.grpc_url, "fido_stream", timeout_s=3) as client, pytest.raises(ReaderError):
        for _ in range(10 * CANCELLED):  # on busy cores the first few may come at another moment
            cancel_in_mid_answer(server)
            client.stream("w1", ["w2"], max_new_tokens=4, min_new_tokens=4).read_to_end()
