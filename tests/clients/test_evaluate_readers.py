"""`fido-client evaluate`: readers compared, and what is checked before the first question."""

import itertools
import json
import pathlib
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fido_client.__main__ import main
from fido_client.metrics import exact_match, f1_score, normalize_answer, percentile
from tests.clients.scripted_server import WHOLE, Refusal, ScriptedServer


def _data(tmp_path: pathlib.Path, passages: list[int], **fields: Any) -> str:
    """One question q0, q1, ... a number, with so many passages; the right answer is "The answer i!"."""
    path = tmp_path / "data.jsonl"
    lines = [
        {"question": f"q{index}", "answers": [f"The answer {index}!"], "ctxs": [{"text": "p"}] * count, **fields}
        for index, count in enumerate(passages)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def _answers(received: Any, context: Any) -> Any:
    """a is right below 6; b says the same in other words below 4, is right at 8, and fails at 9."""
    index = int(received.question[1:])
    if received.model == "a":
        return WHOLE | {"answer": f"answer {index}" if index < 6 else "wrong"}
    if index == 9:
        raise Refusal("slot lost", grpc.StatusCode.INTERNAL)
    return WHOLE | {"answer": f"An answer {index}." if index < 4 or index == 8 else f"other {index}"}


@pytest.mark.parametrize("names", [["a", "b"], ["a,b"]])
def test_two_readers_are_compared(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any, names: list[str]) -> None:
    server.on_infer, server.models = _answers, {"a": {"max_passages": 2}, "b": {}}
    out = tmp_path / "out.jsonl"
    arguments = ["--model", *names, "--url", server.url, "--json", "--predictions", str(out)]
    assert main(["evaluate", _data(tmp_path, [1] * 10), *arguments]) == 1
    captured = capsys.readouterr()
    *table, last = captured.out.splitlines()
    printed = json.loads(last)
    assert [(model["model"], model["em"], model["f1"], model["failed"]) for model in printed["models"]] == [
        ("a", 60.0, 60.0, 0),
        ("b", 50.0, 70.0, 1),  # "other i" has one word of two where it is wrong
    ]
    assert all(model["questions_per_s"] > 0 and model["p50_ms"] > 0 for model in printed["models"])
    assert printed["agreement"] == [{"models": ["a", "b"], "questions": 9, "percent": 44.44}]
    rows = {line[:12].strip(): line[12:].split() for line in table}
    assert (rows[""], rows["exact match"], rows["failed"]) == (["a", "b"], ["60.00", "%", "50.00", "%"], ["0", "1"])
    assert rows["agreement"] == "a and b: 44.44 % of 9 questions".split()
    assert {"F1", "questions/s", "p50 ms"} <= set(rows)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["model"], line["question"]) for line in lines] == [(name, f"q{index}") for name in "ab" for index in range(10)]


def test_readers_are_asked_one_after_another(server: ScriptedServer, tmp_path: pathlib.Path) -> None:
    assert main(["evaluate", _data(tmp_path, [1] * 10), "--model", "a", "b", "c", "--url", server.url]) == 0
    assert [received.model for received in server.received] == ["a"] * 10 + ["b"] * 10 + ["c"] * 10


def test_a_reader_named_twice_is_refused(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    assert main(["evaluate", _data(tmp_path, [1]), "--model", "a", "b,a", "--url", server.url]) == 1
    assert "--model: wanted the names of different readers, got a twice" in capsys.readouterr().err


def _refusal(capsys: Any, arguments: list[str]) -> str:
    """The one line of an evaluation that ends before its first question."""
    assert main(["evaluate", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return str(line)


def test_too_many_passages_are_refused_at_once_with_both_ways_out(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    server.models = {"a": {"max_passages": 50}, "b": {"max_passages": 40}}
    data = _data(tmp_path, [40, 100, 41, 1])
    line = _refusal(capsys, [data, "--model", "a", "b", "--url", server.url, "--max-passages", "45"])
    assert "2 of 4 questions have more passages than b allows, 45 where 40 are allowed" in line
    line = _refusal(capsys, [data, "--model", "b", "--url", server.url])
    assert '--max-passages 40, or export the reader with LIMITS="--max-passages 100"' in line
    assert server.received == []
    assert main(["evaluate", data, "--model", "b", "--url", server.url, "--max-passages", "40"]) == 0
    # several at a time, so they may arrive in any order
    assert sorted(len(received.tensors["passages"]) for received in server.received) == [1, 40, 40, 40]


def test_other_limits_are_checked_too(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    server.models = {"a": {"max_new_tokens": 64, "max_question_characters": 1, "max_passage_characters": 3}}
    data = _data(tmp_path, [1, 1], ctxs=[{"text": "long"}])
    line = _refusal(capsys, [data, "--model", "a", "--url", server.url, "--max-new-tokens", "65"])
    assert "--max-new-tokens: a allows 1 to 64, got 65" in line
    line = _refusal(capsys, [data, "--model", "a", "--url", server.url])
    assert "2 of 2 questions have a question of more than the 1 characters that a allows" in line
    server.models["a"]["max_question_characters"] = 2
    line = _refusal(capsys, [data, "--model", "a", "--url", server.url])
    assert "have a passage of more than the 3 characters" in line and 'LIMITS="--max-passage-characters 4"' in line


def test_questions_that_will_fail_are_announced_where_others_will_not(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    server.models = {"a": {"max_passages": 2}}
    assert main(["evaluate", _data(tmp_path, [1, 0, 1]), "--model", "a", "--url", server.url]) == 1
    assert "warning: " in (error := capsys.readouterr().err)
    assert "1 of 3 questions have no passages, the first is 1: give each at least one; they will fail" in error
    server.received.clear()
    assert "2 of 2 questions have no passages" in _refusal(capsys, [_data(tmp_path, [0, 0]), "--model", "a", "--url", server.url])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fiddo", "'fiddo' is not found; the server has the readers fid, fido"),
        ("fid_stream", "fid_stream is a streaming model, which evaluate does not use; the server has the readers fid, fido"),
        ("fid_encoder", "fid_encoder is not a reader; the server has the readers fid, fido"),
    ],
)
def test_names_of_no_reader_are_answered_with_the_readers(
    server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any, name: str, message: str
) -> None:
    server.models = {"fido": {}, "fid": {}}
    line = _refusal(capsys, [_data(tmp_path, [1] * 9), "--model", "fid", name, "--url", server.url])
    assert line.endswith(message)
    assert server.received == []


def test_a_server_that_is_down_is_one_line(tmp_path: pathlib.Path, capsys: Any) -> None:
    line = _refusal(capsys, [_data(tmp_path, [1] * 10), "--model", "a", "b", "--url", "127.0.0.1:9", "--json"])
    assert line.startswith("error: a at 127.0.0.1:9 is not available") and "nothing listens on port 9" in line


def test_a_server_that_goes_away_ends_the_evaluation(tmp_path: pathlib.Path, capsys: Any) -> None:
    server = ScriptedServer()
    stopping = threading.Thread(target=server.stop)

    def script(received: Any, context: Any) -> Any:
        if received.question == "q3":
            stopping.start()
            server.wait_until_cancelled(context)
        return WHOLE

    server.on_infer = script
    out = tmp_path / "out.jsonl"
    arguments = ["--url", server.url, "--concurrency", "1", "--json", "--predictions", str(out)]
    line = _refusal(capsys, [_data(tmp_path, [1] * 100), *arguments])
    stopping.join()
    assert line.startswith("error: the server went away after 3 of 100 questions: ")
    assert not out.exists() and len(out.with_name("out.jsonl.partial").read_text().splitlines()) == 3


def test_a_server_that_is_full_for_a_moment_does_not_end_it(server: ScriptedServer, tmp_path: pathlib.Path, capsys: Any) -> None:
    def script(received: Any, context: Any) -> Any:
        if received.question == "q3":
            raise Refusal("512 questions in flight", grpc.StatusCode.UNAVAILABLE)
        return WHOLE

    server.on_infer = script
    assert main(["evaluate", _data(tmp_path, [1] * 10), "--url", server.url]) == 1
    assert capsys.readouterr().err.startswith("3: fido at")
    assert len(server.received) == 10


@pytest.mark.parametrize(
    ("prediction", "answers", "wanted"),
    [
        ("the Eiffel Tower", ["Eiffel tower!"], 1.0),
        ("tower", ["Eiffel tower"], 2 / 3),
        ("red red blue", ["red green"], 2 / 5),
        ("Paris", ["London", "Paris, France"], 2 / 3),
        ("Paris", ["London"], 0.0),
        ("the", ["a"], 1.0),
        ("the", ["Paris"], 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_f1_counts_common_words_of_the_best_answer(prediction: str, answers: list[str], wanted: float) -> None:
    assert f1_score(prediction, answers) == pytest.approx(wanted)


def test_f1_of_one_string_as_answers_is_refused() -> None:
    with pytest.raises(TypeError, match="answers: wanted a list of strings"):
        f1_score("Paris", "Paris")


# the right-hand sides are what FiD's own normalize_answer gives (src/evaluation.py, with regex 2026.11.15)
@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  a  B\tc\n", "b c"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),
        ("The. End", "end"),
        ("an", ""),
        ("A.N.", ""),
        ("theatre another cat", "theatre another cat"),
        ("a an the", ""),
        ("thé a", "thé"),
        ("the\u0301 a", "the\u0301"),
        ("a\u200d b", "a\u200d b"),
        ("the² b", "² b"),
        ("a½", "½"),
        ("the\u24b6", "the\u24d0"),
        ("“the” end", "“ ” end"),
        ("rock_and_the_roll", "rockandtheroll"),
        ("12,000 km²", "12000 km²"),
        ("İstanbul", "i̇stanbul"),
        ("a\u00a0b", "b"),
        ("", ""),
    ],
)
def test_normalize_answer_equals_fids(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_exact_match_is_of_any_answer_after_normalising() -> None:
    assert exact_match("The  Eiffel Tower!", ["Louvre", "eiffel tower"])
    assert not exact_match("Eiffel", ["eiffel tower"])
    assert not exact_match("", ["x"])
    assert exact_match("the", ["a"])
    assert not exact_match("anything", [])


def test_exact_match_of_one_string_for_the_answers_is_refused() -> None:
    with pytest.raises(TypeError, match="answers: wanted a list of strings, got the one string 'Paris'"):
        exact_match("P", "Paris")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_equals_numpys_linear_one(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_percentile_by_hand() -> None:
    assert percentile([40, 10, 30, 20], 50) == 25
    assert percentile([10, 20], 99) == pytest.approx(19.9)
    assert percentile([7], 99) == 7
    assert [percentile([1, 2, 3], percent) for percent in (0, 50, 100)] == [1, 2, 3]


def test_percentile_of_nothing_or_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="values: wanted at least one"):
        percentile([], 50)
    for percent in (-1, 101):
        with pytest.raises(ValueError, match="percent: wanted 0 to 100"):
            percentile([1], percent)


def test_articles_go_only_as_whole_words() -> None:
    for before, after in itertools.product("xz9é", repeat=2):
        assert normalize_answer(f"{before}the{after}") == f"{before}the{after}"
