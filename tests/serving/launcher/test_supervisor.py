"""`python -m serving` as a process: it stops cleanly, and it starts again what was killed."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from export.repository import repository_from_engines
from fido_client.reader_client import ReaderClient, ReaderError
from serving.contract.limits import Limits
from serving.launcher import liveness, statistics, supervisor
from serving.launcher.installation import ServerError
from serving.launcher.processes import descendants
from serving.launcher.server import SHM, SHM_PREFIX, TritonServer, free_ports, models_of

ROOT = Path(__file__).parents[3]
READY = "ready; Ctrl-C stops"


@pytest.fixture
def launched(engines, tmp_path):
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    http, grpc, metrics = (str(port) for port in free_ports(3))
    command = [sys.executable, "-m", "serving", "--readers", "fido", "--repository", str(tmp_path / "repository")]
    command += ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--log", str(tmp_path / "log")]
    printed = tmp_path / "printed"
    with printed.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    yield process, f"127.0.0.1:{grpc}", printed
    process.kill()
    process.wait()
    print(printed.read_text(), (tmp_path / "log").read_text(errors="replace")[-20_000:])  # pytest shows it if the test failed


def wait_until_ready(printed: Path, seconds: float) -> None:
    """Until the launcher says so: Triton answers gRPC a moment before, and a death before that is a failed start, not a restart."""
    deadline = time.monotonic() + seconds
    while READY not in printed.read_text():
        assert time.monotonic() < deadline, f"not ready after {seconds:.0f} s: {printed.read_text()}"
        time.sleep(0.05)


def answers(url: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with ReaderClient(url, "fido", timeout_s=3) as client:
                return client.answer("w1", ["w2"]).tokens > 0
        except ReaderError:
            time.sleep(0.2)
    return False


def processes_of(pid: int) -> dict[str, int]:
    found = {}
    for child in descendants(pid):
        command = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        name = Path(command[0]).name
        if name == "tritonserver":
            found["tritonserver"] = child
        elif name == "triton_python_backend_stub":
            found["fido_encoder" if any("/fido_encoder/" in word for word in command) else "fido"] = child
    return found


@pytest.mark.server
@pytest.mark.parametrize("victim", ["fido", "fido_encoder", "tritonserver"])
def test_what_is_killed_is_started_again_and_ctrl_c_leaves_nothing(launched, victim):
    process, url, printed = launched
    wait_until_ready(printed, 60)
    assert answers(url, 60)
    first = processes_of(process.pid)
    os.kill(first[victim], signal.SIGKILL)
    time.sleep(1)
    assert answers(url, 60), "no answer after kill -9"
    second = processes_of(process.pid)
    assert not set(first.values()) & set(second.values())
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    output = printed.read_text()
    assert process.returncode == 0 and output.endswith("stopping\nstopped\n") and "starting again" in output
    assert not [pid for pid in second.values() if Path(f"/proc/{pid}").exists()]
    assert not list(SHM.glob(f"{SHM_PREFIX}{process.pid}-*"))
    assert "fido    fido  " in output and "onnxruntime  float32" in output, "what is served"


class DyingServer:
    """A server of which a model is dead as soon as it is ready; the fourth does not even start."""

    started = 0
    models, grpc_url = ("fido_encoder",), ""

    def __enter__(self):
        DyingServer.started += 1
        if DyingServer.started == 4:
            raise ServerError("no memory")
        return self

    def __exit__(self, *_):
        pass

    def failure(self):
        return "the process of fido has died"

    def drain(self, *_):
        return True

    def stop(self, drain_timeout_s):
        pass


def test_a_server_that_keeps_dying_is_started_again_after_longer_and_longer_pauses(monkeypatch, capsys):
    for name, seconds in (("CHECK_PERIOD_S", 0.001), ("MIN_BACKOFF_S", 0.01), ("MAX_BACKOFF_S", 0.06)):
        monkeypatch.setattr(supervisor, name, seconds)
    stop = threading.Event()
    announced = []

    def announce(server):
        announced.append(server)
        if len(announced) == 6:
            stop.set()

    supervisor.keep_serving(DyingServer, stop, announce)
    assert DyingServer.started == 7 and len(announced) == 6
    messages = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in messages] == [
        *["the process of fido has died"] * 3,
        "no memory",
        *["the process of fido has died"] * 2,
    ]


def test_a_first_start_that_fails_is_an_error():
    class Broken(DyingServer):
        def __enter__(self):
            raise ServerError("no engines")

    with pytest.raises(ServerError, match="no engines"):
        supervisor.keep_serving(Broken, threading.Event(), lambda server: None)


@pytest.mark.server
@pytest.mark.parametrize("model", ["fido", "fido_stream"])
def test_a_model_that_hangs_is_started_again(engines, tmp_path, monkeypatch, capsys, model):
    """Its process lives, Triton calls it ready, and nobody gets an answer."""
    for name, value in {"PERIOD_S": 0.2, "TIMEOUT_S": 1.0}.items():
        monkeypatch.setattr(liveness, name, value)
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    ports = tuple(free_ports(3))
    models, stop, servers = ("fido_encoder", "fido", "fido_stream"), threading.Event(), []
    keeper = threading.Thread(
        target=supervisor.keep_serving,
        args=(lambda: TritonServer(models, tmp_path / "repository", ports, log=tmp_path / "log"), stop, servers.append),
    )
    keeper.start()
    try:
        deadline = time.monotonic() + 60
        while not servers:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2)  # it is asked a few times, and replies
        assert len(servers) == 1 and liveness.replies(servers[0].grpc_url, model, 5)
        with urllib.request.urlopen(servers[0].metrics_url) as response:
            assert f'reader_questions_total{{model="{model}",outcome="refused"}} 0' in response.read().decode()
        os.kill(servers[0].model_processes()[model], signal.SIGSTOP)
        while len(servers) < 2:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text(errors="replace")[-5000:]
            time.sleep(0.05)
        assert answers(f"127.0.0.1:{ports[1]}", 20)
    finally:
        stop.set()
        keeper.join(60)
    assert f"{model}: no reply within 1 s, 2 times in a row; starting again" in capsys.readouterr().err


def test_who_cannot_be_reached_does_not_reply():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        assert not liveness.replies(f"127.0.0.1:{silent.getsockname()[1]}", "fid", 0.5) and time.monotonic() - started < 5
    assert not liveness.replies(f"127.0.0.1:{free_ports(1)[0]}", "fid_stream", 0.5)


READINESS = ROOT / "serving/launcher/preload/readiness.c"


@pytest.fixture
def slow_server(engines, tmp_path, monkeypatch) -> Iterator[tuple[TritonServer, threading.Event, threading.Thread]]:
    """A kept server of long answers, the event that stops it, and its keeper."""
    if shutil.which("cc"):
        library = tmp_path / "libreadiness.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(library), str(READINESS)], check=True)
        monkeypatch.setattr("serving.launcher.environment.READINESS", library)
    limits = Limits(max_new_tokens=4000, default_max_new_tokens=12, slots=8)
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", limits)
    stop = threading.Event()
    servers: list[TritonServer] = []
    http_port, grpc_port, metrics_port = free_ports(3)
    ports = (http_port, grpc_port, metrics_port)
    keeper = threading.Thread(
        target=supervisor.keep_serving,
        args=(
            lambda: TritonServer(models_of(["fido"], stream=True), tmp_path / "repository", ports, log=tmp_path / "log"),
            stop,
            servers.append,
        ),
        kwargs={"draining": supervisor.Draining(timeout_s=60)},
    )
    keeper.start()
    try:
        deadline = time.monotonic() + 60
        while not servers:
            assert time.monotonic() < deadline and keeper.is_alive()
            time.sleep(0.05)
        yield servers[0], stop, keeper
    finally:
        stop.set()
        keeper.join(90)


@pytest.mark.server
def test_a_server_that_is_told_to_end_answers_all_in_flight_and_refuses_the_rest(slow_server):
    server, stop, keeper = slow_server
    idle = http.client.HTTPConnection(server.address, server.http_port)
    idle.request("GET", "/v2/health/ready")
    assert idle.getresponse().read() == b""  # and the connection stays open, as a health check's
    long = {"max_new_tokens": 1500, "min_new_tokens": 1500}
    with ReaderClient(server.grpc_url, "fido", timeout_s=60) as client, ThreadPoolExecutor(8) as pool:
        unary = [pool.submit(client.answer, f"w{i}", ["w2"], **long) for i in range(4)]
        streams = [pool.submit(lambda i=i: client.stream(f"w{i}", ["w2"], **long).read_to_end()) for i in range(4)]
        while statistics.questions_in_flight(server.metrics_url) < 8:
            time.sleep(0.02)
        stop.set()
        refusals = []
        while not all(answer.done() for answer in (*unary, *streams)):
            try:
                client.answer("w1", ["w2"], max_new_tokens=1)
            except ReaderError as error:
                refusals.append(error)
                ready = http.client.HTTPConnection(server.address, server.http_port)
                ready.request("GET", "/v2/health/ready")
                if shutil.which("cc"):
                    assert ready.getresponse().status != 200, "a balancer that asks Triton itself goes elsewhere"
                break
        with pytest.raises(ReaderError, match="shutting down") as streamed:
            client.stream("w1", ["w2"], max_new_tokens=1).read_to_end()
        assert not all(answer.done() for answer in (*unary, *streams)), "the test's answers must be long enough to be in flight"
        assert [answer.result().tokens for answer in (*unary, *streams)] == [1500] * 8
        assert [error.status for error in (*refusals, streamed.value)] == ["UNAVAILABLE"] * 2
    answered = time.monotonic()
    keeper.join(30)
    assert not keeper.is_alive() and time.monotonic() - answered < 15, "an idle connection held the end up"


@pytest.mark.server
def test_a_drain_has_an_end_and_a_second_signal_ends_it(slow_server, capsys):
    server, _, _ = slow_server
    forever = {"max_new_tokens": 4000, "min_new_tokens": 4000}
    with ReaderClient(server.grpc_url, "fido", timeout_s=60) as client, client.stream("w1", ["w2"], **forever) as stream:
        next(stream)
        started = time.monotonic()
        assert not server.drain(timeout_s=0.5) and time.monotonic() - started < 5
        hurry = threading.Event()
        threading.Timer(0.3, hurry.set).start()
        assert not server.drain(timeout_s=600, hurry=hurry) and time.monotonic() - started < 10


@pytest.mark.server
def test_retries_lose_nothing_where_the_server_is_replaced_under_load(engines, tmp_path):
    """Unary and streaming clients, over gRPC and HTTP, of two servers; one is told to end, then killed, and each comes back."""
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    all_ports = free_ports(6)
    stops = [threading.Event(), threading.Event()]
    servers: list[list[TritonServer]] = [[], []]

    def keep(number: int) -> threading.Thread:
        models, ports, log = models_of(["fido"], stream=True), tuple(all_ports[3 * number : 3 * number + 3]), tmp_path / f"log{number}"
        keeper = threading.Thread(
            target=supervisor.keep_serving,
            args=(
                lambda: TritonServer(models, tmp_path / "repository", ports, log=log / "log"),
                stops[number],
                servers[number].append,
                supervisor.Draining(),
            ),
        )
        keeper.start()
        return keeper

    def wait_for(number: int, count: int) -> None:
        deadline = time.monotonic() + 90
        while len(servers[number]) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    keepers = [keep(0), keep(1)]
    done, asked, lost = threading.Event(), [0] * 4, []

    def ask(client: ReaderClient, which: int, streams: bool) -> None:
        while not done.is_set():
            asked[which] += 1
            try:
                tokens = (client.stream("w1", ["w2"]).read_to_end() if streams else client.answer("w1", ["w2"])).tokens
                assert tokens > 0
            except Exception as error:
                lost.append(error)

    try:
        wait_for(0, 1)
        wait_for(1, 1)
        grpc_urls = [f"127.0.0.1:{all_ports[1]}", f"127.0.0.1:{all_ports[4]}"]
        http_urls = [f"127.0.0.1:{all_ports[0]}", f"127.0.0.1:{all_ports[3]}"]
        with ReaderClient(grpc_urls, retries=50) as over_grpc, ReaderClient(http_urls, retries=50, transport="http") as over_http:
            with ThreadPoolExecutor(8) as pool:
                for which, (client, streams) in enumerate(((over_grpc, False), (over_grpc, True), (over_http, False), (over_http, True))):
                    pool.submit(ask, client, which, streams)
                try:
                    time.sleep(1)
                    stops[0].set()
                    keepers[0].join(60)
                    assert not keepers[0].is_alive()
                    stops[0].clear()
                    keepers[0] = keep(0)
                    wait_for(0, 2)
                    os.kill(servers[1][-1].process.pid, signal.SIGSEGV)
                    wait_for(1, 2)
                    time.sleep(1)
                finally:
                    done.set()
    finally:
        for stop, keeper in zip(stops, keepers, strict=True):
            stop.set()
            keeper.join(60)
    assert min(asked) >= 10
    # a stream that had begun on the killed server is the only thing that a retry cannot mend
    assert [error for error in lost if not isinstance(error, ReaderError)] == [] and len(lost) <= 2, lost
