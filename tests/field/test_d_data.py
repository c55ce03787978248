"""Field section D: data and passage files, and a server that is down. Each is run as a user runs it, by the command."""

import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from tests.clients.scripted_server import ScriptedServer

CLIENTS = pathlib.Path(__file__).parents[2] / "clients"
EXAMPLE = {"question": "who?", "answers": ["Paris"], "ctxs": [{"title": "A", "text": "a"}, {"title": "", "text": "b"}]}


@pytest.fixture
def server():
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


def client(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run fido-client."""
    return subprocess.run([sys.executable, "-m", "fido_client", *arguments], cwd=CLIENTS, capture_output=True, text=True, timeout=60)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that printed nothing else."""
    assert done.returncode not in (0, None) and done.stdout == "", done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


class TestD1:
    """Text after the end of a JSON list is not dropped: one line says where it is and what is accepted."""

    @pytest.mark.parametrize("rest", [f"[{json.dumps(EXAMPLE)}]", "the end", json.dumps(EXAMPLE), "]"])
    def test_d1_data(self, server, tmp_path, rest):
        data = tmp_path / "data.json"
        data.write_text(f"[{json.dumps(EXAMPLE)}]\n{rest}\n")
        line = one_line(client("evaluate", str(data), "--url", server.url))
        assert f"{data}:2: wanted nothing after the list's end" in line and "accepted: " in line
        assert server.received == []

    @pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.txt", "p"])
    @pytest.mark.parametrize("rest", ['["b"]', "the end", '"b"'])
    def test_d1_passages(self, server, tmp_path, name, rest):
        passages = tmp_path / name
        passages.write_text(f'["a"]\n{rest}\n')
        line = one_line(client("ask", "--url", server.url, "--question", "q", "--passages", str(passages)))
        assert f"{passages}:2: wanted nothing after the list's end" in line and "accepted: " in line
        assert server.received == []


class TestD2:
    """Common shapes of passages and data are accepted; others are answered with the accepted shapes."""

    @pytest.mark.parametrize(
        "content",
        [
            json.dumps({"passages": EXAMPLE["ctxs"]}),
            json.dumps(EXAMPLE, indent=2),
            json.dumps([EXAMPLE]),
            json.dumps([{"title": "A", "contents": "a"}, {"contents": "b"}]),
            '{"title": "A", "contents": "a"}\r\n{"contents": "b"}\r\n',
            "\ufeff" + json.dumps(EXAMPLE["ctxs"]),
        ],
    )
    def test_d2_passages(self, server, tmp_path, content):
        for name, data in (("p.json", content.encode()), ("p", content.encode()), ("p.json.gz", gzip.compress(content.encode()))):
            passages = tmp_path / name
            passages.write_bytes(data)
            done = client("ask", "--url", server.url, "--question", "q", "--passages", str(passages))
            assert done.returncode == 0, done.stderr
        assert [received.tensors["passages"] for received in server.received] == [["a", "b"]] * 3
        assert [received.tensors["titles"] for received in server.received] == [["A", ""]] * 3

    @pytest.mark.parametrize("content", ['{"docs": ["a"]}', '[["a"]]', '{"passages": {"a": 1}}', "[1, 2]", '[{"body": "a"}]', "null"])
    def test_d2_other_passages(self, server, tmp_path, content):
        passages = tmp_path / "p.json"
        passages.write_text(content)
        line = one_line(client("ask", "--url", server.url, "--question", "q", "--passages", str(passages)))
        assert f"{passages}:1: " in line and 'accepted: a JSON list, or one a line, of strings or {"title", "text"}' in line

    @pytest.mark.parametrize("content", [json.dumps(EXAMPLE, indent=2), json.dumps([EXAMPLE]), json.dumps(EXAMPLE)])
    @pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data"])
    def test_d2_data(self, server, tmp_path, name, content):
        data = tmp_path / name
        data.write_bytes(content.replace("\n", "\r\n").encode("utf-8-sig"))
        done = client("evaluate", str(data), "--url", server.url, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["em"] == 100.0

    @pytest.mark.parametrize("content", ['{"data": []}', "question\tanswer\n", '["who?"]', '{"text": "a"}'])
    def test_d2_other_data(self, server, tmp_path, content):
        data = tmp_path / "data.json"
        data.write_text(content)
        line = one_line(client("evaluate", str(data), "--url", server.url))
        assert f"{data}:1:" in line and 'accepted: a JSON list of {"question", "answers": [...], "ctxs": [{"title", "text"}]}' in line


class TestD3:
    """A server that is down is one error before the first question, and no score is made of no answers."""

    def test_d3_down(self, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text((json.dumps(EXAMPLE) + "\n") * 50)
        line = one_line(client("evaluate", str(data), "--url", "127.0.0.1:9", "--model", "a", "b", "--json"))
        assert "nothing listens on port 9" in line

    def test_d3_goes_away(self, tmp_path):
        server = ScriptedServer()
        server.on_infer = lambda received, context: server.stop()
        data = tmp_path / "data.jsonl"
        data.write_text((json.dumps(EXAMPLE) + "\n") * 50)
        line = one_line(client("evaluate", str(data), "--url", server.url, "--concurrency", "1"))
        assert "the server went away after 0 of 50 questions" in line

    def test_d3_no_answers(self, server, tmp_path):
        data = tmp_path / "data.jsonl"
        data.write_text((json.dumps(EXAMPLE) + "\n") * 3)
        server.on_infer = lambda received, context: {"answer": "no totals"}
        done = client("evaluate", str(data), "--url", server.url, "--json")
        assert done.returncode == 1
        assert "exact match  unknown: no question was answered" in done.stdout
        assert json.loads(done.stdout.splitlines()[-1])["em"] is None
