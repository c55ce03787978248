"""Several servers on one host as one: places, metrics, health, and the whole with two replicas and the real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from export.repository import repository_from_engines
from fido_client.reader_client import ReaderClient
from serving.contract.limits import Limits
from serving.launcher.cleanup import SHM, SHM_PREFIX
from serving.launcher.endpoints import free_ports
from serving.launcher.fleet import PORT_STEP, merged_metrics, places_of
from serving.launcher.installation import ServerError
from serving.launcher.processes import descendants
from tests.serving.launcher.stand_in import ends_within

ROOT = Path(__file__).parents[3]
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2, 10)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)


def test_gpus_and_replicas_share_the_cores(eight_cores, monkeypatch):
    first, second = places_of("0,3", 1)
    assert (first.label, first.cores, first.variables) == (("gpu", "0"), (2, 3, 4, 5), {"CUDA_VISIBLE_DEVICES": "0"})
    assert (second.label, second.cores, second.variables) == (("gpu", "3"), (6, 7, 8, 9), {"CUDA_VISIBLE_DEVICES": "3"})
    assert [(place.label, place.cores, dict(place.variables)) for place in places_of(None, 3)] == [
        (("replica", "0"), (2, 3), {}),
        (("replica", "1"), (4, 5), {}),
        (("replica", "2"), (6, 7), {}),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert [place.variables["CUDA_VISIBLE_DEVICES"] for place in places_of("0,1", 1)] == ["5", "GPU-abc"]
    with pytest.raises(ServerError, match="CUDA_VISIBLE_DEVICES has 2: 5,GPU-abc"):
        places_of("0,2", 1)
    assert "CUDA_MPS_PIPE_DIRECTORY" not in places_of("0,1", 1)[0].variables
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps-{gpu}")  # a multi-process daemon for each GPU
    assert [place.variables["CUDA_MPS_PIPE_DIRECTORY"] for place in places_of("0,1", 1)] == ["/tmp/mps-0", "/tmp/mps-1"]


def test_all_gpus_are_those_that_nvidia_smi_lists(eight_cores, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n[ \"$1\" = -L ] && printf 'GPU 0: A (UUID: x)\\n  MIG 1g: (UUID: y)\\nGPU 1: A (UUID: z)\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [place.name for place in places_of("all", 1)] == ["gpu 0", "gpu 1"]
    program.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(ServerError, match="--gpus all: nvidia-smi"):
        places_of("all", 1)


@pytest.mark.parametrize("gpus", ["", ",", "0,0", "-1", "one"])
def test_gpus_that_are_none_are_refused(eight_cores, gpus):
    with pytest.raises(ServerError, match="wanted numbers or UUIDs of different GPUs"):
        places_of(gpus, 1)


def test_more_servers_than_cores_are_refused(eight_cores):
    with pytest.raises(ServerError, match="9 servers on 8 CPU cores"):
        places_of(None, 9)


def test_metrics_of_all_servers_are_one_text_with_a_label_more():
    head = "# HELP a Number of a\n# TYPE a counter\n"
    texts = [
        (("gpu", "0"), head + 'a{model="x"} 1\na{model="y z"} 2.5\n# HELP b b\n# TYPE b gauge\nb 7\n'),
        (("gpu", "1"), head + 'a{model="x"} 3\n'),
    ]
    assert merged_metrics(texts).splitlines() == [
        "# HELP a Number of a",
        "# TYPE a counter",
        'a{gpu="0",model="x"} 1',
        'a{gpu="0",model="y z"} 2.5',
        'a{gpu="1",model="x"} 3',
        "# HELP b b",
        "# TYPE b gauge",
        'b{gpu="0"} 7',
    ]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def free_block() -> int:
    """A port whose three and the servers' six, in steps, are free."""
    for _ in range(50):
        port = free_ports(1)[0]
        wanted = {port + offset + step for offset in range(3) for step in (0, PORT_STEP, 2 * PORT_STEP)}
        if max(wanted) < 65536:
            return port
    raise AssertionError("no free ports")


@pytest.mark.server
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two servers need two cores")
@pytest.mark.parametrize("front", ["none", pytest.param("haproxy", marks=pytest.mark.skipif(HAPROXY is None, reason="no HAProxy"))])
def test_two_replicas_are_one_server(engines, tmp_path, front):
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    port = free_block()
    command = [sys.executable, "-m", "serving", "--readers", "fido", "--stream", "--repository", str(tmp_path / "repository")]
    command += ["--http-port", str(port), "--grpc-port", str(port + 1), "--metrics-port", str(port + 2)]
    command += ["--replicas", "2", "--front", front, "--log", str(tmp_path / "log" / "triton.log")]
    printed = tmp_path / "printed"
    with printed.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "ready; Ctrl-C stops" not in printed.read_text():
            assert time.monotonic() < deadline and process.poll() is None, printed.read_text()
            time.sleep(0.05)
        tritons = [child for child in descendants(process.pid) if is_triton(child)]
        assert len(tritons) == 2 and not os.sched_getaffinity(tritons[0]) & os.sched_getaffinity(tritons[1]), "each has cores of its own"
        ports = [port] if front == "haproxy" else [port + PORT_STEP, port + 2 * PORT_STEP]
        metrics = f"http://127.0.0.1:{port + 2}"
        grpc_urls, http_urls = [f"127.0.0.1:{one + 1}" for one in ports], [f"127.0.0.1:{one}" for one in ports]
        assert f"gRPC       {','.join(grpc_urls)}\n" in printed.read_text()
        assert get(f"{metrics}/v2/health/ready") == (200, json.dumps({"replica 0": True, "replica 1": True}))
        with ReaderClient(grpc_urls, retries=100) as client, ReaderClient(http_urls, retries=100, transport="http") as over_http:
            for _ in range(6):
                assert (
                    client.answer("w1", ["w2"]).tokens
                    == over_http.answer("w1", ["w2"]).tokens
                    == client.stream("w1", ["w2"]).read_to_end().tokens
                )
            sample = r'^reader_questions_total\{replica="(\d)",model="fido",outcome="answered"\} (\d+)'
            counts: list[int] = []
            while sum(counts) < 12:  # published four times a second
                assert time.monotonic() < deadline + 30, counts
                time.sleep(0.1)
                counts = [int(count) for _, count in re.findall(sample, get(f"{metrics}/metrics")[1], re.M)]
            assert sum(counts) == 12 and len(counts) == 2 and all(counts), counts
            long = {"min_new_tokens": 500, "max_new_tokens": 500}
            whole = client.answer("w1", ["w2"], **long).text
            with client.stream("w1", ["w2"], **long) as cut, over_http.stream("w1", ["w2"], **long) as cut_over_http:
                begun = [next(cut).text, next(cut_over_http).text]
                for triton in tritons:  # one serves the one stream, one the other
                    os.kill(triton, signal.SIGKILL)
                assert [cut.read_to_end().text, cut_over_http.read_to_end().text] == [whole, whole]
                assert min(cut.answer.latency_s, cut_over_http.answer.latency_s) > 0.5, "no answer was whole before its server died"
                assert all(whole.startswith(part) for part in begun)
            while get(f"{metrics}/v2/health/ready")[1].count("true") < 2:
                assert time.monotonic() < deadline + 60
            tritons += [child for child in descendants(process.pid) if is_triton(child)]
            os.kill(tritons[-1], signal.SIGKILL)
            assert client.answer("w1", ["w2"]).tokens > 0 and over_http.answer("w1", ["w2"]).tokens > 0
            seen = {get(f"{metrics}/v2/health/ready")}
            while get(f"{metrics}/v2/health/ready")[1].count("true") < 2 or len(seen) < 2:
                assert time.monotonic() < deadline + 120
                seen.add(get(f"{metrics}/v2/health/ready"))
            assert {status for status, _ in seen} == {200}, "one server is enough"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        print(printed.read_text())
    output = printed.read_text()
    assert output.endswith("stopped\n") and re.search("replica [01]: tritonserver has ended", output)
    assert all(ends_within(child, 5) for child in tritons)
    assert not list(SHM.glob(f"{SHM_PREFIX}{process.pid}-*"))


def is_triton(pid: int) -> bool:
    return Path(os.readlink(f"/proc/{pid}/exe")).name == "tritonserver"
