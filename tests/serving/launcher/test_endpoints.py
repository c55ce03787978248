"""Ports and TLS files are checked before Triton starts, and the message says whose option is wrong."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serving.launcher import log, supervisor
from serving.launcher.endpoints import PortError, fetch, free_ports, require_free_ports, tls_arguments
from serving.launcher.installation import ServerError
from serving.launcher.log import EXCERPT_LINES, LogExcerpt, LogPump, request_fields
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


# Triton's output becomes two files of bounded size, one of them JSON lines, and never blocks Triton.

FIELDS = {"model": "fido", "request": 'a "b"', "outcome": "answered", "answer": "é\u2028\n\\", "total_ms": 1.5, "error": None}
HEAD = "I1126 08:27:15.353726 1043 reader_model.py:126] "


def as_triton_writes_it(fields: dict) -> str:
    return HEAD + json.dumps(json.dumps(fields, ensure_ascii=False), ensure_ascii=False)


def pumped(folder: Path, *content: bytes) -> LogPump:
    pump = LogPump(folder / "tritonserver.log", folder / "requests.jsonl")
    for part in content:
        os.write(pump.write_fd, part)
    pump.close_write_end()
    pump.join()
    return pump


def test_requests_are_json_lines_of_their_own(tmp_path):
    other = f'{HEAD}"successfully loaded"'
    lines = [as_triton_writes_it(FIELDS), other, HEAD + json.dumps(FIELDS)]  # the last: with Triton's escaping off
    pumped(tmp_path, "\n".join(lines).encode())
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().split("\n") if line]
    assert [{key: value for key, value in request.items() if key != "time"} for request in requests] == [FIELDS, FIELDS]
    assert all(next(iter(request)) == "time" for request in requests)
    assert (tmp_path / "tritonserver.log").read_text() == other + "\n"


@pytest.mark.parametrize(
    "line", ["", "I x] ", f'{HEAD}"{{broken"', f"{HEAD}{{}}", f'{HEAD}"[1]"', f'{HEAD}"{{\\"model\\": 1}}"', '{"model": 1}']
)
def test_what_is_no_request_stays_in_the_log(line):
    assert request_fields(line) is None


def test_a_line_is_taken_whole_however_it_arrives(tmp_path):
    content = as_triton_writes_it(FIELDS).encode()
    middle = content.index("é".encode()) + 1  # in the middle of a character
    pumped(tmp_path, content[:middle], content[middle:] + b"\n")
    assert json.loads((tmp_path / "requests.jsonl").read_text())["answer"] == FIELDS["answer"]


def test_files_rotate_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MAX_FILE_BYTES", 1000)
    pumped(tmp_path, *(b"line %05d\n" % i for i in range(3000)))
    files = sorted(tmp_path.glob("tritonserver.log*"))
    assert len(files) == log.OLD_FILES + 1 and all(path.stat().st_size <= 1000 for path in files)
    assert (tmp_path / "tritonserver.log").read_text().endswith("line 02999\n")


def test_earlier_output_stays(tmp_path):
    pumped(tmp_path, b"first\n")
    pumped(tmp_path, b"second\n")
    assert (tmp_path / "tritonserver.log").read_text() == "first\nsecond\n"


def test_a_full_disk_does_not_block_the_server(tmp_path):
    pump = LogPump(Path("/dev/full"), Path("/dev/full"))
    content = (b"x" * 99 + b"\n") * 20_000 + as_triton_writes_it(FIELDS).encode()

    def write() -> None:
        for i in range(0, len(content), 5000):
            os.write(pump.write_fd, content[i : i + 5000])

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive()
    pump.close_write_end()
    assert pump.excerpt().startswith("xxx"), "it was read to the end"


def test_a_line_without_end_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MAX_LINE_BYTES", 10_000)
    taken = []
    monkeypatch.setattr(LogExcerpt, "add", lambda self, line: taken.append(len(line)))
    pumped(tmp_path, *[b"y" * 5000] * 40)
    assert sum(taken) == 200_000 and max(taken) <= 10_000 + log.READ_BYTES


def test_the_excerpt_is_the_cause_and_not_what_follows_it_for_pages():
    cause = 'E1124 13:38:36.1 8619 model_lifecycle.cc:642] "failed to load fid: decoder_step.onnx: SHA-256 wanted 12..., got 34..."'
    after = [f"E1124 13:38:39.{i} 8619 ev_epoll1_linux.cc:373] (event_engine) Epoll1Poller encountered epoll_wait error" for i in range(50)]
    others = [f"E1124 13:38:40.1 8619 x.cc:1] another {i}" for i in range(50)]
    excerpt = LogExcerpt()
    for line in ["I1124 13:38:35.1 8619 server.cc:1] started", cause, *after, *others]:
        excerpt.add(line)
    assert excerpt.lines()[:3] == [cause, after[0], others[0]] and len(excerpt.lines()) == EXCERPT_LINES


def test_without_a_fault_the_excerpt_is_the_end():
    excerpt = LogExcerpt()
    for i in range(100):
        excerpt.add(f"line {i} " + "z" * 10_000)
    assert excerpt.lines()[-1].startswith("line 99 ") and len("".join(excerpt.lines())) <= EXCERPT_LINES * log.EXCERPT_CHARACTERS
