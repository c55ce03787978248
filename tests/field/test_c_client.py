"""Field section C, the rows of the client: TLS mistakes, one asyncio client in two event loops, a closed pipe."""

import asyncio
import os
import pathlib
import re
import subprocess
import sys

import grpc
import pytest

from fido_client import AsyncReaderClient
from tests.clients.scripted_server import ScriptedServer

CLIENTS = pathlib.Path(__file__).parents[2] / "clients"
TESTDATA = pathlib.Path(__file__).parents[1] / "clients" / "testdata"
KEY, CERTIFICATE = TESTDATA / "tls_key.pem", TESTDATA / "tls_certificate.pem"
COMMAND = [sys.executable, "-m", "fido_client"]


@pytest.fixture
def server():
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


@pytest.fixture
def tls_server():
    scripted = ScriptedServer(grpc.ssl_server_credentials([(KEY.read_bytes(), CERTIFICATE.read_bytes())]))
    yield scripted
    scripted.stop()


@pytest.fixture
def passages(tmp_path) -> str:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    return str(path)


class TestC5:
    """A TLS mistake is named as what it is, in one line."""

    def ask(self, passages: str, *arguments: str) -> str:
        command = [*COMMAND, "ask", "--question", "q", "--passages", passages, *arguments]
        done = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        return line

    def test_c5_plain_client_on_a_tls_port(self, tls_server, passages):
        assert f"port {tls_server.port} speaks TLS: set ssl=True (--ssl)" in self.ask(passages, "--url", tls_server.url)

    def test_c5_tls_client_on_a_plain_port(self, server, passages):
        assert f"port {server.port} does not encrypt: leave out ssl=True (--ssl)" in self.ask(passages, "--url", server.url, "--ssl")

    def test_c5_certificate_that_is_not_trusted(self, tls_server, passages):
        assert "the server's certificate is not trusted (" in self.ask(passages, "--url", tls_server.url, "--ssl")

    def test_c5_missing_and_wrong_files(self, tls_server, passages):
        tls = ["--url", tls_server.url, "--ssl", "--root-certificates"]
        assert "none.pem: No such file" in self.ask(passages, *tls, "none.pem")
        assert f"wanted a PEM file of certificates, got {KEY}" in self.ask(passages, *tls, str(KEY))


class TestC6:
    """One AsyncReaderClient may be used in one event loop after another."""

    def test_c6_two_event_loops(self, server):
        client = AsyncReaderClient(server.url)

        async def ask() -> str:
            return (await client.answer("q", ["p"])).text

        assert (asyncio.run(ask()), asyncio.run(ask())) == ("Paris", "Paris")
        asyncio.run(client.aclose())


class TestC7:
    """A reader of standard output that leaves ends the command without a word."""

    @pytest.mark.parametrize("reads", [0, 1])
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--help"],
            ["ask", "--help"],
            ["ask", "--question", "q", "--passages", "PASSAGES"],
            ["ask", "--question", "q", "--passages", "PASSAGES", "--stream"],
            ["ask", "--question", "q", "--passages", "PASSAGES", "--stream", "--json"],
            ["evaluate", "DATA", "--json"],
        ],
    )
    def test_c7_closed_pipe(self, server, passages, tmp_path, reads, arguments):
        data = tmp_path / "data.jsonl"
        data.write_text('{"question": "q", "answers": ["Paris"], "ctxs": [{"text": "p"}]}\n')
        filled = [{"PASSAGES": passages, "DATA": str(data)}.get(argument, argument) for argument in arguments]
        url = [] if "--help" in arguments else ["--url", server.url]
        for unbuffered in ({}, {"PYTHONUNBUFFERED": "1"}):
            reading, writing = os.pipe()
            process = subprocess.Popen(
                [*COMMAND, *filled, *url], cwd=CLIENTS, stdout=writing, stderr=subprocess.PIPE, env={**os.environ, **unbuffered}
            )
            os.close(writing)
            if reads:
                os.read(reading, 1)
            os.close(reading)
            error = process.communicate(timeout=60)[1]
            assert error == b"", error.decode()
            # argparse ignores a closed pipe
            assert process.returncode in ((0, 141) if reads or "--help" in arguments else (141,))


@pytest.mark.server
@pytest.mark.slow
def test_c11_clients_that_leave_in_mid_answer_cost_nobody_else_an_answer():
    """A short storm; `make storm` is the long one, in all kinds."""
    command = [sys.executable, "-m", "tests.stress.storm", "--left", "100", "--loops", "1", "--seed", "3"]
    kinds = ["--kinds", "grpc-first", "client-close"]
    done = subprocess.run([*command, *kinds], cwd=CLIENTS.parent, capture_output=True, text=True, timeout=500, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    left = re.fullmatch(r"storm: (\d+) left, 0 server deaths, 0 lost, 0 slots still held", last)
    assert left and int(left[1]) >= 100, done.stdout + done.stderr
