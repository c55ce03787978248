"""Ports and TLS files are checked before Triton starts, and the message says whose option is wrong."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serving.launcher import supervisor
from serving.launcher.endpoints import PortError, fetch, free_ports, require_free_ports
from serving.launcher.installation import ServerError
from serving.launcher.tls import tls_arguments
from tests.serving.launcher.stand_in import install_stand_in, write_models

ROOT = Path(__file__).parents[3]
CERTIFICATES = ROOT / "tests/clients/testdata"
CERTIFICATE, KEY = CERTIFICATES / "tls_certificate.pem", CERTIFICATES / "tls_key.pem"


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


@pytest.fixture
def other_server():
    """Answers every request with success, as another tritonserver would."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_serve_on_a_port_that_answers_already_ends_with_one_line(other_server, tmp_path, monkeypatch):
    install_stand_in(tmp_path, monkeypatch)
    write_models(tmp_path / "repository", fid="python", fid_encoder="python")
    (tmp_path / "repository/fid/1").mkdir(exist_ok=True)
    (tmp_path / "repository/fid/1/manifest.json").write_text("{}")  # exported, as far as the choice of readers goes
    _, grpc, metrics = free_ports(3)
    command = [
        sys.executable,
        "-m",
        "serving",
        "--readers",
        "fid",
        "--repository",
        str(tmp_path / "repository"),
        "--log",
        str(tmp_path / "l"),
    ]
    command += ["--http-port", str(other_server), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "ready" not in done.stdout
    assert done.stderr == (
        f"error: --http-port {other_server}: another process listens on 127.0.0.1:{other_server}; stop it or choose another port\n"
    )


def test_every_fault_of_the_ports_is_named(other_server):
    free = free_ports(1)[0]
    with pytest.raises(PortError, match=rf"^--grpc-port {other_server}: another process listens on [^;]*; stop[^;]*$"):
        require_free_ports("127.0.0.1", (free, other_server, free_ports(1)[0]))
    with pytest.raises(PortError, match=f"--http-port {free}: also the port of --metrics-port"):
        require_free_ports("127.0.0.1", (free, free_ports(1)[0], free))
    with pytest.raises(PortError, match=r"--address 192\.0\.2\.1: no address of this machine"):
        require_free_ports("192.0.2.1", (free, *free_ports(2)))
    require_free_ports("127.0.0.1", (free, *free_ports(2)))


def test_a_port_that_is_lost_between_two_starts_ends_serving():
    class LosesItsPort:
        started, models, grpc_url = 0, ("fid_encoder",), ""

        def __enter__(self):
            LosesItsPort.started += 1
            if LosesItsPort.started == 2:
                raise PortError("--grpc-port 8001: another process listens on it")
            return self

        def __exit__(self, *_):
            pass

        def failure(self):
            return "the process of fid has died"

        def stop(self, drain_timeout_s):
            pass

    with pytest.raises(PortError, match="--grpc-port 8001"):
        supervisor.keep_serving(LosesItsPort, threading.Event(), lambda server: None)
    assert LosesItsPort.started == 2


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(other_server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(f"http://127.0.0.1:{other_server}/v2/health/ready", 5) == b"ok"


def test_good_tls_files_become_arguments():
    assert tls_arguments(CERTIFICATE, KEY, None) == ["--grpc-use-ssl=true", f"--grpc-server-cert={CERTIFICATE}", f"--grpc-server-key={KEY}"]
    assert tls_arguments(CERTIFICATE, KEY, CERTIFICATE)[3:] == ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={CERTIFICATE}"]
    assert tls_arguments(None, None, None) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("nowhere", KEY, None), r"^--tls-certificate .*nowhere: cannot be read: No such file or directory$"),
        ((CERTIFICATE, "nowhere", None), r"^--tls-key .*nowhere: cannot be read: No such file or directory$"),
        ((CERTIFICATE, KEY, "nowhere"), r"^--tls-root .*nowhere: cannot be read"),
        ((CERTIFICATE, ".", None), r"^--tls-key .*: cannot be read: Is a directory$"),
        (("der", KEY, None), r"^--tls-certificate .*der: wanted a PEM file .*, got 3 bytes"),
        ((KEY, KEY, None), r"^--tls-certificate .* and --tls-key .*: not a certificate with its private key"),
        ((CERTIFICATE, CERTIFICATE, None), r"^--tls-certificate .* and --tls-key .*: not a certificate with its private key"),
        ((CERTIFICATE, KEY, KEY), r"^--tls-root .*: wanted a certificate"),
    ],
)
def test_a_wrong_tls_file_is_named_with_its_option(tmp_path, files, message):
    (tmp_path / "der").write_bytes(b"\x30\x82\x01")
    paths = [None if file is None else tmp_path / file for file in files]
    with pytest.raises(ServerError, match=message) as caught:
        tls_arguments(*paths)
    assert "\n" not in str(caught.value)
