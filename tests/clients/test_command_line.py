"""The command fido-client: what it prints, what it writes and how it exits."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from fido_client.__main__ import main
from tests.clients.scripted_server import WHOLE, Refusal, ScriptedServer


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    """Ten questions q0 to q9 whose right answer is "The answer i!"."""
    path = tmp_path / "data.jsonl"
    ctxs = [{"title": f"t{number}", "text": f"p{number}"} for number in range(5)]
    lines = [{"id": f"id{index}", "question": f"q{index}", "answers": ["?", f"The answer {index}!"], "ctxs": ctxs} for index in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _right_below(limit: int) -> Any:
    def script(received: Any, context: Any) -> Any:
        index = int(received.question[1:])
        return WHOLE | {"answer": f"answer {index}" if index < limit else "wrong"}

    return script


def _passages(tmp_path: pathlib.Path, name: str, content: str) -> str:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return str(path)


# ask


def test_ask_prints_answer_log_prob_tokens_and_time(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    passages = _passages(tmp_path, "p.txt", "One.\n\n  Two. \n")
    assert main(["ask", "--url", server.url, "--model", "fid", "--question", "q?", "--passages", passages, "--max-new-tokens", "5"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (lines["answer"], lines["log-prob"], lines["tokens"]) == ("Paris", "-0.5000", "3")
    assert lines["time"].endswith(" ms")
    (received,) = server.received
    assert received.model == "fid"
    assert received.tensors == {"question": ["q?"], "passages": ["One.", "Two."], "max_new_tokens": [5]}


def test_ask_shows_the_passages_that_the_answer_rests_on(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    evidence = {"passage_scores": [1.0, 0.5, 8.5, 0.0], "token_log_probs": [-0.25, -0.25]}
    server.on_infer = lambda received, context: {"answer": "Paris", "log_prob": -0.5, "tokens": 2} | evidence
    listed = json.dumps(["One.", {"title": "T", "text": "Two."}, {"title": "Capital", "text": "x " * 99}, "Four."])
    passages = _passages(tmp_path, "p.json", listed)
    assert main(["ask", "--url", server.url, "--question", "q?", "--passages", passages]) == 0
    rest = capsys.readouterr().out.partition("passages\n")[2].splitlines()
    assert [line.split("%")[0].strip() for line in rest] == ["85", "10", "5"]
    assert rest[0].strip().startswith("85 %  Capital: x x") and rest[0].endswith("...") and rest[2].endswith("T: Two.")
    assert main(["ask", "--url", server.url, "--question", "q?", "--passages", passages, "--json"]) == 0
    assert evidence.items() <= json.loads(capsys.readouterr().out).items()


def test_ask_chooses_among_allowed_answers_and_a_stream_does_not(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    server.on_infer = lambda received, context: WHOLE | {"answers": ["Paris", "Lyon"], "answer_log_probs": [-0.25, -1.5]}
    command = ["ask", "--url", server.url, "--question", "q", "--passages", _passages(tmp_path, "p", "x")]
    command += ["--allowed-answers", "Lyon", "Paris", "--num-answers", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == ["answers", "   -0.2500  Paris", "   -1.5000  Lyon"]
    assert server.received[0].tensors["allowed_answers"] == ["Lyon", "Paris"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer_log_probs"] == [-0.25, -1.5]
    assert main([*command, "--stream"]) == 1
    assert "--stream: a stream has neither beams nor choices; leave out" in capsys.readouterr().err


def test_ask_reads_json_jsonl_and_standard_input(server: ScriptedServer, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    listed = json.dumps([{"title": "A", "text": "a"}, "b"])
    names = [
        _passages(tmp_path, "p.json", listed),
        _passages(tmp_path, "p", f"\ufeff {listed}\n"),
        _passages(tmp_path, "p.jsonl", '{"title": "A", "text": "a"}\n\n"b"\n'),
    ]
    for name in [*names, "-"]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
        assert main(["ask", "--url", server.url, "--question", "q", "--passages", name]) == 0
    assert [received.tensors["titles"] for received in server.received] == [["A", ""]] * 4
    assert [received.tensors["passages"] for received in server.received] == [["a", "b"]] * 4


def test_ask_json_is_one_line(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    assert main(["ask", "--url", server.url, "--question", "q", "--passages", _passages(tmp_path, "p", "x"), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    printed = json.loads(line)
    assert printed.pop("latency_ms") > 0
    assert printed == {"answer": "Paris", "log_prob": -0.5, "tokens": 3}


def test_ask_stream_prints_pieces_as_they_come(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    passages = _passages(tmp_path, "p", "x")
    assert main(["ask", "--url", server.url, "--question", "q", "--passages", passages, "--stream"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "Paris"
    assert [line.split("  ")[0] for line in rest] == ["log-prob", "tokens", "time", "first token", "inter-token"]
    assert server.received[0].model == "fido_stream"

    assert main(["ask", "--url", server.url, "--question", "q", "--passages", passages, "--stream", "--json"]) == 0
    *pieces, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [piece["piece"] for piece in pieces] == ["Pa", "ris"]
    assert last["answer"] == "Paris"
    assert last["time_to_first_token_ms"] <= last["latency_ms"]
    assert last["mean_inter_token_ms"] >= 0


def test_ask_stream_shows_a_piece_before_the_next_is_there(server: ScriptedServer, tmp_path: pathlib.Path) -> None:
    shown = threading.Event()

    def script(received: Any, context: Any) -> Iterator[Any]:
        yield {"answer": "Pa"}
        assert shown.wait(10)
        yield {"answer": "ris"}
        yield WHOLE | {"answer": ""}

    server.on_stream = script
    command = [sys.executable, "-m", "fido_client", "ask", "--url", server.url, "--question", "q", "--stream"]
    command += ["--passages", _passages(tmp_path, "p", "x")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2] / "clients", env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"Pa"
        shown.set()
        assert process.stdout.read().startswith(b"ris\n")
    assert process.returncode == 0


def test_ask_that_fails_says_why_and_exits_3(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    def refuse(received: Any, context: Any) -> Any:
        raise Refusal("question: too long")

    server.on_infer = refuse
    assert main(["ask", "--url", server.url, "--question", "q", "--passages", _passages(tmp_path, "p", "x"), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: fido at" in captured.err and "question: too long" in captured.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '["a",\n}', r"p\.json:2:1: not JSON"),
        (
            "p.json",
            '{"body": "a"}',
            r'p\.json:1: wanted a passage, got the keys body; accepted: a JSON list, .* strings or \{"title", "text"\}',
        ),
        ("p.jsonl", '"a"\n\n{"text"}\n', r"p\.jsonl:3:8: not JSON"),
        ("p.txt", "\n \n", r"p\.txt: wanted at least one passage, got none"),
    ],
)
def test_ask_with_a_bad_passage_file_exits_2(
    server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any, name: str, content: str, message: str
) -> None:
    assert main(["ask", "--url", server.url, "--question", "q", "--passages", _passages(tmp_path, name, content)]) == 1
    assert server.received == []
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_ask_with_wrong_settings_exits_2(tmp_path: pathlib.Path, capsys: Any) -> None:
    passages = _passages(tmp_path, "p", "x")
    assert main(["ask", "--question", "q", "--passages", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: No such file" in capsys.readouterr().err
    assert main(["ask", "--question", "q", "--passages", passages, "--url", "http://x:8000"]) == 1
    assert "url: wanted host:port" in capsys.readouterr().err
    assert main(["ask", "--question", "q", "--passages", passages, "--ssl", "--root-certificates", "none.pem"]) == 1
    assert "none.pem: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["ask", "--question", "q", "--passages", passages, "--max-new-tokens", "0"])
    assert "wanted a whole number from 1, got '0'" in capsys.readouterr().err


# evaluate


def test_evaluate_scores_with_fids_exact_match_and_prints_the_json_last(server: ScriptedServer, data: pathlib.Path, capsys: Any) -> None:
    server.on_infer = _right_below(7)
    assert main(["evaluate", str(data), "--url", server.url, "--concurrency", "3", "--json"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out.splitlines()[-1])
    assert list(printed) == ["model", "questions", "em", "f1", "questions_per_s", "p50_ms", "p99_ms", "failed"]
    assert (printed["model"], printed["questions"], printed["em"], printed["failed"]) == ("fido", 10, 70.0, 0)
    assert 0 < printed["p50_ms"] <= printed["p99_ms"]
    assert printed["questions_per_s"] > 0
    assert "exact match  70.00 %" in captured.out


def test_evaluate_cuts_passages_and_questions(server: ScriptedServer, data: pathlib.Path) -> None:
    arguments = ["--n-passages", "2", "--limit", "3", "--max-new-tokens", "6", "--model", "fid"]
    assert main(["evaluate", str(data), "--url", server.url, *arguments]) == 0
    assert len(server.received) == 3
    for received in server.received:
        assert received.model == "fid"
        assert received.tensors["passages"] == ["p0", "p1"]
        assert received.tensors["titles"] == ["t0", "t1"]
        assert received.tensors["max_new_tokens"] == [6]


def test_evaluate_writes_predictions_in_order_with_failures_in_their_place(
    server: ScriptedServer, data: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    def script(received: Any, context: Any) -> Any:
        if received.question == "q3":
            raise Refusal("out of slots", grpc.StatusCode.INTERNAL)
        return _right_below(9)(received, context)

    server.on_infer = script
    out = tmp_path / "out.jsonl"
    assert main(["evaluate", str(data), "--url", server.url, "--predictions", str(out), "--json"]) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"id{index}" for index in range(10)]
    assert lines[0].pop("latency_s") > 0
    assert lines[0] == {
        "id": "id0",
        "question": "q0",
        "answers": ["?", "The answer 0!"],
        "em": True,
        "prediction": "answer 0",
        "log_prob": -0.5,
        "tokens": 3,
    }
    assert (lines[3]["em"], lines[3]["prediction"]) == (False, None)
    assert "out of slots" in lines[3]["error"]
    assert lines[9]["em"] is False and "error" not in lines[9]
    printed = json.loads(captured.out.splitlines()[-1])
    assert (printed["em"], printed["failed"], printed["questions"]) == (80.0, 1, 10)
    assert "id3: fido at" in captured.err and "out of slots" in captured.err
    assert not out.with_name("out.jsonl.partial").exists()


def test_evaluate_where_all_fail_exits_3_without_scores_or_times(server: ScriptedServer, data: pathlib.Path, capsys: Any) -> None:
    def refuse(received: Any, context: Any) -> Any:
        raise Refusal("out of slots", grpc.StatusCode.INTERNAL)

    server.on_infer = refuse
    assert main(["evaluate", str(data), "--url", server.url, "--json"]) == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out.splitlines()[-1])
    unknown = dict.fromkeys(["em", "f1", "questions_per_s", "p50_ms", "p99_ms"])
    assert printed == {"model": "fido", "questions": 10, "failed": 10} | unknown
    assert "exact match  unknown: no question was answered" in captured.out
    assert captured.err.count("out of slots") == 5
    assert "and 5 more failed" in captured.err


def test_warmup_is_over_before_the_clock_starts_but_is_scored(server: ScriptedServer, data: pathlib.Path, capsys: Any) -> None:
    events: list[tuple[str, str]] = []

    def script(received: Any, context: Any) -> Any:
        warm = received.question in ("q0", "q1")
        events.append(("start", received.question))
        time.sleep(0.5 if warm else 0)
        events.append(("end", received.question))
        return _right_below(1)(received, context)

    server.on_infer = script
    assert main(["evaluate", str(data), "--url", server.url, "--warmup", "2", "--json"]) == 0
    assert {question for _, question in events[:4]} == {"q0", "q1"}
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["questions"], printed["em"]) == (10, 10.0)
    assert printed["p99_ms"] < 450
    assert printed["questions_per_s"] > 8 / 0.5


def test_throughput_is_answers_over_the_wall_clock(server: ScriptedServer, data: pathlib.Path, capsys: Any) -> None:
    def script(received: Any, context: Any) -> Any:
        time.sleep(0.05)
        if received.question in ("q0", "q1"):
            raise Refusal("no")
        return WHOLE

    server.on_infer = script
    assert main(["evaluate", str(data), "--url", server.url, "--concurrency", "5", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 8 / 5 < printed["questions_per_s"] <= 8 / 0.1  # ten requests, five at a time, eight answers
    assert 50 <= printed["p50_ms"] <= printed["p99_ms"]


def test_data_without_answers_have_no_exact_match(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "q", "ctxs": [{"text": "p"}]}), encoding="utf-8")
    assert main(["evaluate", str(data), "--url", server.url, "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["em"] is None
    assert "unknown: the data have no answers" in out


def test_evaluate_with_bad_data_or_output_exits_1_before_sending(
    server: ScriptedServer, data: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"question": "q", "ctxs": []}\n{"question": 1, "ctxs": []}\n', encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    for arguments, message in [
        ([str(broken)], "broken.jsonl:2: question: wanted a string, got a number"),
        ([str(empty)], "empty.jsonl: wanted at least one example, got none"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl: No such file"),
        ([str(data), "--predictions", str(tmp_path / "no" / "out.jsonl")], "out.jsonl.partial: No such file"),
        ([str(data), "--timeout-s", "0"], "timeout_s: wanted seconds above 0"),
    ]:
        assert main(["evaluate", "--url", server.url, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert server.received == []


def test_interrupted_evaluation_keeps_the_old_predictions_and_the_new_beside_them(
    server: ScriptedServer, data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n", encoding="utf-8")
    original = json.dumps

    def interrupting(value: Any, **kwargs: Any) -> str:
        if value.get("id") == "id4":
            raise KeyboardInterrupt
        return original(value, **kwargs)

    monkeypatch.setattr(json, "dumps", interrupting)
    assert main(["evaluate", str(data), "--url", server.url, "--predictions", str(out)]) == 130
    assert out.read_text(encoding="utf-8") == "old\n"
    assert len(out.with_name("out.jsonl.partial").read_text(encoding="utf-8").splitlines()) == 4
    assert "interrupted" in capsys.readouterr().err


def test_module_runs_as_a_command() -> None:
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-m", "clients", "--help"], check=True, capture_output=True, text=True, cwd=root)
    assert "ask" in result.stdout and "evaluate" in result.stdout
