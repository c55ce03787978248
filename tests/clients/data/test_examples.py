import gzip
import json
import pathlib
from typing import Any

import pytest

from fido_client.data.examples import ACCEPTED, Context, Example, ExampleError, read_examples

CTXS = [{"id": "1", "title": "A", "text": "a"}, {"title": "B", "text": "b"}, {"text": "c"}]
FIRST = {"id": "q1", "question": "who?", "target": "me", "answers": ["me", "I"], "ctxs": CTXS}
SECOND = {"question": "where?", "answers": ["here"], "ctxs": []}


def _written(path: pathlib.Path, content: str) -> pathlib.Path:
    path.write_bytes(content.encode("utf-8"))
    return path


def _jsonl(path: pathlib.Path, *examples: Any) -> pathlib.Path:
    return _written(path, "".join(json.dumps(example) + "\n" for example in examples))


def _fault(path: pathlib.Path) -> str:
    with pytest.raises(ExampleError) as caught:
        list(read_examples(path))
    return str(caught.value)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "list", "lines"])
def test_list_and_lines_hold_the_same_examples(tmp_path: pathlib.Path, name: str) -> None:
    if name in ("data.json", "list"):
        path = _written(tmp_path / name, "\ufeff" + json.dumps([FIRST, SECOND], indent=2))
    else:
        path = _written(tmp_path / name, "\ufeff" + json.dumps(FIRST) + "\n\n" + json.dumps(SECOND))
    contexts = (Context("a", "A"), Context("b", "B"), Context("c"))
    assert list(read_examples(path)) == [
        Example("q1", "who?", ("me", "I"), contexts, "me"),
        Example("1", "where?", ("here",), ()),  # without an id: its index, as FiD numbers them
    ]


def test_n_context_keeps_the_first_and_limit_stops_before_a_broken_line(tmp_path: pathlib.Path) -> None:
    path = _written(tmp_path / "data.jsonl", json.dumps(FIRST) + "\n{broken\n")
    (example,) = read_examples(path, n_context=2, limit=1)
    assert [context.text for context in example.contexts] == ["a", "b"]


def test_scored_contexts_are_sorted_best_first_before_the_cut(tmp_path: pathlib.Path) -> None:
    scored = [{"text": text, "score": score} for text, score in (("low", 1), ("tie", "7.5"), ("tie too", 7.5), ("high", 80.25))]
    path = _jsonl(tmp_path / "data.jsonl", {**FIRST, "ctxs": scored}, {**FIRST, "ctxs": [*scored, {"text": "unscored"}]})
    first, second = read_examples(path, n_context=3)
    assert [context.text for context in first.contexts] == ["high", "tie", "tie too"]
    assert [context.text for context in second.contexts] == ["low", "tie", "tie too"]  # not all have a score: the file's order


def test_answers_fall_back_to_the_target_and_then_to_none(tmp_path: pathlib.Path) -> None:
    path = _jsonl(tmp_path / "data.jsonl", {"question": "q", "target": "t", "ctxs": []}, {"question": "q", "ctxs": []})
    assert [example.answers for example in read_examples(path)] == [("t",), ()]


def test_context_becomes_a_passage_with_its_title_where_it_has_one() -> None:
    assert Context("a", "A", 1.0).as_passage() == {"text": "a", "title": "A"}
    assert Context("a").as_passage() == {"text": "a"}


def test_empty_files_hold_no_examples(tmp_path: pathlib.Path) -> None:
    assert list(read_examples(_written(tmp_path / "empty.jsonl", "\n"))) == []
    assert list(read_examples(_written(tmp_path / "empty.json", " [ ] "))) == []


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([], f"wanted an object with question, answers and ctxs, got a list; accepted: {ACCEPTED}"),
        ({"text": "p"}, f"wanted question, answers and ctxs, got the keys text; accepted: {ACCEPTED}"),
        ({**FIRST, "question": None}, "question: wanted a string, got nothing"),
        ({**FIRST, "answers": "me"}, "answers: wanted a list of strings"),
        ({**FIRST, "answers": ["me", 3]}, "answers: wanted a list of strings"),
        ({**FIRST, "target": 3}, "target: wanted a string, got a number"),
        ({"question": "q"}, "ctxs: wanted a list of passages, got nothing"),
        ({**FIRST, "ctxs": [["a"]]}, "ctxs[0]: wanted a string or an object with title and text, got a list"),
        ({**FIRST, "ctxs": [*CTXS, {"title": "D"}]}, "ctxs[3].text: wanted a string, got nothing"),
        ({**FIRST, "ctxs": [{"text": "a", "title": 1}]}, "ctxs[0].title: wanted a string, got a number"),
        ({**FIRST, "ctxs": [{"text": "a", "score": "high"}]}, "ctxs[0].score: wanted a number, got 'high'"),
        ({"ctxs": 1}, "question: wanted a string, got nothing; ctxs: wanted a list of passages, got a number"),
    ],
)
def test_fault_names_file_line_and_field(tmp_path: pathlib.Path, example: Any, message: str) -> None:
    assert _fault(_jsonl(tmp_path / "data.jsonl", FIRST, example)) == f"{tmp_path}/data.jsonl:2: {message}"
    pretty = _written(tmp_path / "data.json", "[\n" + json.dumps(FIRST, indent=1) + ",\n" + json.dumps(example) + "\n]")
    line = len(json.dumps(FIRST, indent=1).splitlines()) + 2
    assert _fault(pretty) == f"{tmp_path}/data.json:{line}: {message}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": 1', "1:15: not JSON"),
        ("b.json", '[\n{"question": "q", "ctxs": []},\n{]', "3:2: not JSON"),
        ("c.json", '[\n{"question": "q", "ctxs": []}\n{', "3: wanted a comma or the list's end, got '{'"),
        ("d.json", '[{"question": "q", "ctxs": []}', "1: wanted a comma or the list's end, got the file's end"),
        ("e.jsonl", '{"question": "q", "ctxs": []}\n{"question": "q", "ctxs": []} {}', "2:31: not JSON"),
        ("f.json", "[" * 100_000, "1: not JSON that can be read: nested too deeply"),
        ("g.json", "[" + "9" * 5000 + "]", "1: not JSON that can be read: Exceeds the limit"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path: pathlib.Path, name: str, text: str, message: str) -> None:
    assert _fault(_written(tmp_path / name, text)).startswith(f"{tmp_path}/{name}:{message}")


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: pathlib.Path) -> None:
    for name in ("latin.jsonl", "latin.json"):
        path = tmp_path / name
        path.write_bytes((json.dumps(FIRST) + "\n").encode() + b'{"question": "caf\xe9"}')
        assert _fault(path) == f"{path}:2: wanted UTF-8, got the byte 0xe9"


def test_counts_below_one_and_missing_files_are_refused_at_the_call(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="n_context: wanted a whole number from 1"):
        read_examples(tmp_path / "x.jsonl", n_context=0)
    with pytest.raises(ValueError, match="limit: wanted a whole number from 1"):
        read_examples(tmp_path / "x.jsonl", limit=0)
    with pytest.raises(FileNotFoundError):
        list(read_examples(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", json.dumps(FIRST, indent=2)),
        ("one.jsonl", json.dumps(FIRST)),
        ("list.jsonl", json.dumps([FIRST])),
        ("lines.json", json.dumps(FIRST) + "\r\n"),
        ("comma.json", json.dumps([FIRST])[:-1] + ", ]"),
        ("commas.jsonl", json.dumps(FIRST) + ",\n"),
    ],
)
def test_content_decides_how_a_file_is_read_and_not_its_name(tmp_path: pathlib.Path, name: str, text: str) -> None:
    contexts = (Context("a", "A"), Context("b", "B"), Context("c"))
    assert list(read_examples(_written(tmp_path / name, text))) == [Example("q1", "who?", ("me", "I"), contexts, "me")]


def test_gzip_is_read_whatever_its_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(FIRST) + "\n").encode()))
    assert [example.question for example in read_examples(path)] == ["who?"]


def test_names_of_other_tools_are_accepted(tmp_path: pathlib.Path) -> None:
    elements = [
        {"question": "q", "answer": "x", "passages": ["a"]},
        {"question": "q", "answer": ["x", "y"], "contexts": [{"contents": "a", "title": "A"}]},
    ]
    first, second = read_examples(_jsonl(tmp_path / "data.jsonl", *elements))
    assert (first.answers, first.contexts) == (("x",), (Context("a"),))
    assert (second.answers, second.contexts) == (("x", "y"), (Context("a", "A"),))


@pytest.mark.parametrize("end", ["[]", "and more", '{"question": "q", "ctxs": []}'])
def test_text_after_the_list_is_refused_and_not_dropped(tmp_path: pathlib.Path, end: str) -> None:
    path = _written(tmp_path / "data.json", f"[{json.dumps(FIRST)}]\n\n{end}\n")
    assert _fault(path) == f"{path}:3: wanted nothing after the list's end, got {end[:20]!r}; accepted: {ACCEPTED}"
