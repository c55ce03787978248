"""The containers and the proxy. NVIDIA's: TensorRT's package is found whatever its major version, and CuPy fits the container's CUDA.

The plain one is built without a registry (its base by debootstrap), run as it should be in production, asked and stopped: `make
container-test`, as root on a machine with podman, buildah, runc and debootstrap.

The proxy (deploy/proxy): what ends Triton 2.51 is refused before it reaches it, and good requests pass. Needs HAProxy (apt-get install
haproxy).
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.build import build_reader
from export.repository import repository_from_engines
from serving.contract.limits import Limits
from serving.launcher.endpoints import fetch, free_ports
from serving.launcher.server import TritonServer, models_of
from tests.cluster.build import IMAGE_TOOLS, Engine, check_tools, plain_image
from tests.stress.asking import exchange
from tests.stress.faults.processes import HTTP
from tests.stress.mutants.http import request
from tests.stress.questions import Case

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "container" / "requirements.py"
container = types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))
SERVING, GPU = ((ROOT / name).read_text() for name in ("requirements.txt", "requirements-gpu.txt"))


@pytest.mark.parametrize(
    ("cuda", "installed", "wanted"),
    [
        (
            "12.6.2.004",
            "libnvinfer10 10.5.0.18-1+cuda12.6\nlibnvinfer-bin 10.5.0.18-1+cuda12.6\n",
            ["cupy-cuda12x", "tensorrt-cu12==10.5.0.*"],
        ),
        ("13.1.0", "libnvinfer11 11.0.1.5-1+cuda13.1\nlibnvinfer-dev 11.0.1.5-1+cuda13.1\n", ["cupy-cuda13x", "tensorrt-cu13==11.0.1.*"]),
    ],
)
def test_the_container_decides_which_cupy_and_tensorrt(cuda: str, installed: str, wanted: list[str]):
    found = container.requirements(SERVING, GPU, cuda, installed)
    cupy = next(line for line in found if line.startswith("cupy"))
    assert cupy.split("==")[0] == wanted[0] and found[-1] == wanted[1]
    assert cupy.split("==")[1] in GPU  # the version that requirements-gpu.txt pins
    assert any(line.startswith("numpy==1.26.4") for line in found) and any(line.startswith("tokenizers==") for line in found)
    assert len([line for line in found if line.startswith("onnxruntime==")]) == SERVING.count("\nonnxruntime==")


@pytest.mark.parametrize(
    ("cuda", "installed", "message"),
    [
        ("", "libnvinfer10 10.5.0.18-1\n", "CUDA_VERSION: wanted the image's CUDA version"),
        ("12.6.2", "", "TensorRT: wanted one package libnvinferN, got ''"),
        ("12.6.2", "libnvinfer10 10.5.0.18-1\nlibnvinfer11 11.0.1.5-1\n", "TensorRT: wanted one package"),
        ("12.6.2", "libnvinfer-bin 10.5.0.18-1\n", "TensorRT: wanted one package"),
    ],
)
def test_what_cannot_be_told_fails_loudly(cuda: str, installed: str, message: str):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        container.requirements(SERVING, GPU, cuda, installed)


def test_a_missing_pin_fails_loudly():
    with pytest.raises(SystemExit, match=r"wanted pins of tokenizers, cupy-cuda\*x, got none"):
        container.requirements("numpy==1.26.4\nonnxruntime==1.23.2\n", "", "12.6.2", "libnvinfer10 10.5.0.18-1\n")


def test_the_command_asks_dpkg(tmp_path: Path):
    dpkg = tmp_path / "dpkg-query"
    dpkg.write_text('#!/bin/sh\necho "libnvinfer11 11.0.1.5-1+cuda13.1"\n')
    dpkg.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VERSION": "13.1.0"}
    done = subprocess.run([sys.executable, SCRIPT, ROOT], env=env, capture_output=True, text=True, check=True)
    assert "tensorrt-cu13==11.0.1.*" in done.stdout.splitlines()
    failed = subprocess.run([sys.executable, SCRIPT, ROOT], env={**env, "CUDA_VERSION": ""}, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: CUDA_VERSION") and not failed.stdout


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the image `fido`, built from this tree on a Debian 12 made by debootstrap."""
    check_tools(IMAGE_TOOLS)
    folder = tmp_path_factory.mktemp("containers")
    engine = Engine(folder)
    plain_image(engine, folder)
    yield engine
    engine("podman", "rm", "--all", "--force")
    engine("podman", "rmi", "--all", "--force")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_reader(str(ROOT / "checkpoints" / "fido"), folder / "engines", "onnxruntime", Limits(), log=lambda _: None)
    repository_from_engines(folder / "engines", folder / "repository", "fido", Limits())
    for parent in (folder, *folder.parents[:2]):  # pytest's folders are root's alone, and the server is another user
        parent.chmod(0o755)
    return folder / "repository"


@pytest.mark.container
@pytest.mark.timeout(900)
def test_the_plain_image_serves_as_nobody_special_on_a_read_only_root_and_stops(engine: Engine, models: Path) -> None:
    from fido_client.reader_client import ReaderClient

    http, grpc, metrics = free_ports(3)
    hardened = ["--read-only", "--tmpfs", "/tmp", "--shm-size", "256m", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--stream"]
    started = engine(
        "podman", "run", "-d", "--name", "fido", *hardened, "--network", "host", "-v", f"{models}:/models:ro", "localhost/fido", *ports
    )
    assert started.returncode == 0, started.stdout
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            fetch(f"http://127.0.0.1:{http}/v2/health/ready", timeout_s=1)
            break
        except OSError:
            time.sleep(0.5)
    else:
        pytest.fail(engine("podman", "logs", "fido").stdout)
    with ReaderClient(f"127.0.0.1:{grpc}", "fido") as reader:
        assert (
            reader.answer("what is the capital of France?", ["France: Capital: name: Paris", "Belgium: Capital: Brussels"]).text == "Paris"
        )
        assert reader.stream("what is the capital of France?", ["France: Capital: name: Paris"]).read_to_end().text == "Paris"
    seen = engine(
        "podman", "exec", "fido", "sh", "-c", "id -u; touch /x /opt/fido/x /models/x; ls /tmp; cat /proc/*/cmdline | tr '\\0' ' '"
    )
    assert seen.stdout.startswith("1000\n") and seen.stdout.count("Read-only file system") == 3, seen.stdout
    # nothing that runs was copied to /tmp, which may be mounted noexec
    assert "/opt/fido/.venv/lib/python3.11/site-packages/pytriton/tritonserver/backends/python/triton_python_backend_stub" in seen.stdout
    logs = engine("podman", "logs", "fido").stdout
    assert "warning" not in logs, logs  # both preloaded libraries are there
    assert engine("podman", "stop", "--time", "60", "fido").returncode == 0
    assert engine("podman", "inspect", "fido", "--format", "{{.State.ExitCode}}").stdout.strip() == "0"
    assert engine("podman", "logs", "fido").stdout.rstrip().endswith("stopped")


def test_a_backend_with_the_right_stub_in_place_is_not_copied(tmp_path: Path) -> None:
    from serving.launcher.installation import Installation, prepared_backends

    python, stub = tmp_path / "backends" / "python", tmp_path / "stub"
    python.mkdir(parents=True)
    stub.write_bytes(b"of this Python")
    wheel = Installation(tmp_path / "tritonserver", tmp_path / "backends", stub)
    (python / "triton_python_backend_stub").write_bytes(b"of another one")
    assert prepared_backends(wheel, tmp_path / "scratch") == tmp_path / "scratch" / "backends"
    (python / "triton_python_backend_stub").write_bytes(b"of this Python")
    assert prepared_backends(wheel, tmp_path / "other") == tmp_path / "backends" and not (tmp_path / "other").exists()


HAPROXY = os.environ.get("HAPROXY") or shutil.which("haproxy")
with_proxy = pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")
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


@pytest.mark.server
@with_proxy
@pytest.mark.parametrize(("make", "status"), list(zip(HTTP, (400, 400, 411, 404, 404), strict=True)), ids=[make.__name__ for make in HTTP])
def test_what_ends_triton_is_refused_and_the_server_lives_on(make, status: int, port: int, server: TritonServer) -> None:
    before = server.model_processes()
    endpoint, body, headers = make(CASE)
    assert ask(port, body, endpoint, headers)[0] in (status, None)  # None: it was refused, and closed, before all of it was sent
    good, answer = ask(port, json.dumps(CASE.body()).encode())
    assert good == 200 and json.loads(answer)["tokens"] == 4
    assert server.failure() is None and server.model_processes() == before


@pytest.mark.server
@with_proxy
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


@pytest.mark.server
@with_proxy
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


@pytest.mark.server
@with_proxy
@pytest.mark.parametrize("prefix", ["[1,", '{"b":2,"a":', '[{"a":'])
def test_nesting_is_seen_however_it_is_written(prefix: str, port: int, server: TritonServer) -> None:
    status, _ = ask(port, f'{{"question": "[\\"", "passages": {prefix * 100_000}'.encode())
    assert status == 400 and server.failure() is None


@pytest.mark.server
@with_proxy
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
