"""Passage files: every accepted shape, and one line for each that is not."""

import gzip
import json
import pathlib

import pytest

from fido_client.data.passages import ACCEPTED, PassageFileError, read_passages

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
    assert str(caught.value).endswith(f"; accepted: {ACCEPTED}") and "\n" not in str(caught.value)


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
