"""Field section A, the client's half: data with more passages than a reader takes, and names that no reader has."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.clients.scripted_server import ScriptedServer

CLIENTS = pathlib.Path(__file__).parents[2] / "clients"


@pytest.fixture
def server():
    scripted = ScriptedServer()
    scripted.models = {"nq": {"max_passages": 40}, "trivia": {"max_passages": 100}}
    yield scripted
    scripted.stop()


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "nq.jsonl"
    lines = [{"question": f"q{index}", "answers": ["Paris"], "ctxs": [{"text": "p"}] * 100} for index in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def evaluate(server: ScriptedServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fido_client", "evaluate", *arguments, "--url", server.url]
    return subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=60)


class TestA5:
    """100 passages a question and a reader that takes 40: one line before the first question, with both ways out."""

    def test_a5_refused_with_both_ways_out(self, server, data):
        done = evaluate(server, data, "--model", "nq")
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert "50 of 50 questions have more passages than nq allows, 100 where 40 are allowed" in line
        assert 'send the first 40 with --max-passages 40, or export the reader with LIMITS="--max-passages 100"' in line
        assert server.received == []

    def test_a5_first_way_out(self, server, data):
        assert evaluate(server, data, "--model", "nq", "--max-passages", "40").returncode == 0
        assert {len(received.tensors["passages"]) for received in server.received} == {40}

    def test_a5_second_way_out(self, server, data):
        assert evaluate(server, data, "--model", "trivia").returncode == 0
        assert {len(received.tensors["passages"]) for received in server.received} == {100}


class TestA6:
    """A name that no reader has is answered with the names that there are; commas separate names."""

    def test_a6_unknown_name(self, server, data):
        done = evaluate(server, data, "--model", "nq,trivai")
        assert done.returncode != 0 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert "trivai" in line and "the server has the readers nq, trivia" in line
        assert server.received == []

    def test_a6_commas(self, server, data):
        done = evaluate(server, data, "--model", "nq,trivia", "--max-passages", "2", "--json")
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout.splitlines()[-1])
        assert [model["model"] for model in printed["models"]] == ["nq", "trivia"]
        assert printed["agreement"] == [{"models": ["nq", "trivia"], "questions": 50, "percent": 100.0}]
