"""`python -m serving` as a process: it stops cleanly, and it starts again what was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from export.repository import repository_from_engines
from fido_client.reader_client import ReaderClient, ReaderError
from serving.contract.limits import Limits
from serving.launcher import liveness, supervisor
from serving.launcher.installation import ServerError
from serving.launcher.processes import descendants
from serving.launcher.server import SHM, SHM_PREFIX, TritonServer, free_ports

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
