import gzip
import json
import pathlib
from typing import Any

import pytest

from fido_client.data.examples import ACCEPTED, Context, Example, ExampleError, read_examples
from fido_client.data.passages import ACCEPTED as ACCEPTED_PASSAGES
from fido_client.data.passages import PassageFileError, read_passages

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


# Passage files: every accepted shape, and one line for each that is not.

WANTED = [{"title": "A", "text": "a"}, "b"]
LISTED = json.dumps(WANTED)


def _file(tmp_path: pathlib.Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", LISTED),
        ("pretty.json", json.dumps(WANTED, indent=2).replace("\n", "\r\n")),
        ("mark.json", b"\xef\xbb\xbf" + LISTED.encode()),
        ("comma.json", LISTED[:-1] + ",\n]"),
        ("list.jsonl", LISTED),
        ("list", LISTED),
        ("list.txt", f"\n  {LISTED}\n"),
        ("lines.jsonl", '{"title": "A", "text": "a"}\r\n\r\n"b"\r\n'),
        ("lines.json", '{"title": "A", "text": "a"}\n"b"\n'),
        ("commas.jsonl", '{"title": "A", "text": "a"},\n"b",\n'),
        ("contents.jsonl", '{"id": "7", "title": "A", "contents": "a"}\n"b"'),
        ("passages.json", json.dumps({"passages": WANTED})),
        ("contexts.json", json.dumps({"contexts": WANTED}, indent=1)),
        ("example.json", json.dumps({"question": "q", "answers": ["x"], "ctxs": WANTED})),
        ("examples.json", json.dumps([{"question": "q", "ctxs": WANTED}])),
        ("example.jsonl", json.dumps({"question": "q", "ctxs": WANTED}) + "\n"),
        ("list.json.gz", gzip.compress(LISTED.encode())),
        ("renamed.json", gzip.compress(LISTED.encode())),
    ],
)
def test_accepted_shapes_hold_the_same_passages(tmp_path: pathlib.Path, name: str, content: str | bytes) -> None:
    assert read_passages(_file(tmp_path, name, content)) == WANTED


@pytest.mark.parametrize("text", ["[1] Paris is large.\n[2] It is old.\n", "[Music]\nWords.\n", "{sic} it says\nb\n"])
def test_plain_text_may_open_with_a_bracket(tmp_path: pathlib.Path, text: str) -> None:
    assert read_passages(_file(tmp_path, "p.txt", text)) == text.splitlines()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '["a"]\n["b"]', ":2: wanted nothing after the list's end, got '[\"b\"]'"),
        ("p", '["a"] and more', ":1: wanted nothing after the list's end, got 'and more'"),
        ("p.jsonl", '["a"]\n["b"]', ":2: wanted nothing after the list's end"),
        ("p.json", '{"passages": ["a"]}\n{"passages": ["b"]}', ":2: wanted the passages of one question, got 2 values"),
        ("p.json", '{"passages": "a"}', ":1: passages: wanted a list"),
        ("p.json", '{"title": "A", "body": "a"}', ":1: wanted a passage, got the keys title, body"),
        ("p.json", "{}", ":1: wanted a passage, got the keys (none)"),
        ("p.json", "3", ":1: wanted a passage, got a JSON int"),
        ("p.json", '[["A", "a"]]', ":1: wanted a passage, got a JSON list"),
        ("p.json", '["a",\n {"text": 3}]', ":2: wanted a passage, got a int as text"),
        ("p.json", '[{"text": "a", "title": 3}]', ":1: title: wanted a string, got a JSON int"),
        ("p.json", "question\tanswer\n", ":1:1: not JSON"),
        ("p.json", '{\n "passages": ["a"]\n} x', ":3: wanted nothing after the object's end, got 'x'"),
    ],
)
def test_other_shapes_are_refused_in_one_line_that_shows_the_accepted_ones(
    tmp_path: pathlib.Path, name: str, content: str, message: str
) -> None:
    path = _file(tmp_path, name, content)
    with pytest.raises(PassageFileError) as caught:
        read_passages(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert str(caught.value).endswith(f"; accepted: {ACCEPTED_PASSAGES}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "got a git-lfs pointer: run git lfs pull"),
        ('["a"]'.encode("utf-16"), "wanted UTF-8 text or gzip, got UTF-16 text"),
        (b"PK\x03\x04rest", "wanted UTF-8 text or gzip, got a zip archive"),
        (gzip.compress(LISTED.encode())[:-9], "the gzip data are damaged"),
        (b'["caf\xe9"]', ":1: wanted UTF-8, got the byte 0xe9"),
        (b"\n\n", "wanted at least one passage, got none"),
        (b"[]", "wanted at least one passage, got none"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    with pytest.raises(PassageFileError) as caught:
        read_passages(_file(tmp_path, "p.json", content))
    assert message in str(caught.value) and "\n" not in str(caught.value)
