"""deploy/proxy: what ends Triton 2.51 is refused before it reaches it, and good requests pass. Needs HAProxy (apt-get install haproxy)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.repository import repository_from_engines
from serving.contract.limits import Limits
from serving.launcher.endpoints import free_ports
from serving.launcher.server import TritonServer, models_of
from tests.stress.asking import exchange
from tests.stress.faults.fatal_requests import HTTP
from tests.stress.mutants.http import request
from tests.stress.questions import Case

ROOT = Path(__file__).parents[2]
HAPROXY = os.environ.get("HAPROXY") or shutil.which("haproxy")
pytestmark = [pytest.mark.server, pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")]
CASE = Case("fido", "w1 w2", ["w3 w4", "w5"], ["w6", ""], 4, 4)


@pytest.fixture(scope="module")
def server(engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    repository_from_engines(engines["fido"][1], repository, "fid", Limits())  # the fatal requests name this model
    with TritonServer(models_of(["fid"], stream=True), repository) as server:
        yield server


@pytest.fixture(scope="module")
def port(server: TritonServer) -> Iterator[int]:
    """The proxy's."""
    (port,) = free_ports(1)
    env = {**os.environ, "FIDO_BIND": f"127.0.0.1:{port}", "FIDO_HTTP": f"127.0.0.1:{server.http_port}"}
    assert HAPROXY is not None
    with subprocess.Popen([HAPROXY, "-db", "-f", "deploy/proxy/haproxy.cfg"], cwd=ROOT, env=env) as proxy:
        try:
            for _ in range(50):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield port
        finally:
            proxy.terminate()


def ask(port: int, body: bytes, endpoint: str = "generate", headers: dict[str, str] | None = None) -> tuple[int | None, bytes]:
    return exchange(port, request(f"/v2/models/fid/{endpoint}", body, headers))


@pytest.mark.parametrize(("make", "status"), list(zip(HTTP, (400, 400, 411, 404, 404), strict=True)), ids=[make.__name__ for make in HTTP])
def test_what_ends_triton_is_refused_and_the_server_lives_on(make, status: int, port: int, server: TritonServer) -> None:
    before = server.model_processes()
    endpoint, body, headers = make(CASE)
    assert ask(port, body, endpoint, headers)[0] in (status, None)  # None: it was refused, and closed, before all of it was sent
    good, answer = ask(port, json.dumps(CASE.body()).encode())
    assert good == 200 and json.loads(answer)["tokens"] == 4
    assert server.failure() is None and server.model_processes() == before


def test_triton_itself_would_not_have_survived(engines, tmp_path: Path) -> None:
    """If this fails, Triton has been mended: the proxy's look at the JSON can go."""
    repository_from_engines(engines["fido"][1], tmp_path, "fid", Limits())
    with TritonServer(models_of(["fid"], stream=False), tmp_path) as server:
        endpoint, body, headers = HTTP[0](CASE)
        ask(server.http_port, body, endpoint, headers)
        deadline = time.monotonic() + 30
        while server.failure() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.failure() is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [("[" * 500_000, "brackets"), ('"}]\\"{[' * 50_000, "quotes and escapes"), ("é\u4e2d" * 20_000, "not ASCII"), ("x" * 49_000, "long")],
    ids=["brackets", "quotes and escapes", "not ASCII", "long"],
)
def test_texts_of_any_content_pass_as_without_the_proxy(text: str, why: str, port: int, server: TritonServer) -> None:
    body = json.dumps(CASE.body() | {"passages": [text, "w5"]}).encode()
    through, direct = ask(port, body), ask(server.http_port, body)
    assert through[0] == direct[0], why
    if direct[0] == 200:
        assert json.loads(through[1])["answer"] == json.loads(direct[1])["answer"]


@pytest.mark.parametrize("prefix", ["[1,", '{"b":2,"a":', '[{"a":'])
def test_nesting_is_seen_however_it_is_written(prefix: str, port: int, server: TritonServer) -> None:
    status, _ = ask(port, f'{{"question": "[\\"", "passages": {prefix * 100_000}'.encode())
    assert status == 400 and server.failure() is None


def test_streams_and_health_pass_and_nothing_else(port: int) -> None:
    status, events = exchange(port, request("/v2/models/fid_stream/generate_stream", json.dumps(CASE.body()).encode()))
    assert status == 200 and events.count(b"data: ") >= 2 and b'"tokens":4' in events
    refused = [
        "/v2/repository/index",
        "/v2/systemsharedmemory/status",
        "/v2/models/fid/infer",
        "/v2/models/fid/config/../generate",
        "/metrics",
    ]
    for path in refused:
        assert exchange(port, request(path, b"{}"))[0] == 404, path
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/fid/ready", timeout=5) as response:
        assert response.status == 200
    assert ask(port, b"x" * 4_000_001)[0] in (413, None)
    assert ask(port, b"2\r\n{}\r\n0\r\n\r\n", headers={"Content-Length": "", "Transfer-Encoding": "chunked"})[0] == 411
