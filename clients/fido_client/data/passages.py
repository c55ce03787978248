"""The passages of one question: a JSON, JSONL or plain text file -> passages for ReaderRequest. Needs only the standard library."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from .json_values import DataFileError, json_values, open_data, read_lines

ACCEPTED = (
    'a JSON list, or one a line, of strings or {"title", "text"}; {"passages": [...]}; one example of FiD\'s format; '
    "or plain text with one passage a line"
)
_LISTS = ("ctxs", "passages", "contexts")
_TEXTS = ("text", "contents")
# a JSON list or object; plain text may open with "[1] ..." as well
_OPENS_JSON = re.compile(r'\s*(\[\s*(["{\[\]]|$)|\{\s*("|$))')


class PassageFileError(DataFileError):
    """A passage file that cannot be read; the message names the file and, if possible, the line."""


def read_passages(name: str) -> list[str | dict[str, Any]]:
    """The passages of a file, or of standard input if the name is "-".

    A name ending in .json or .jsonl, or content that opens with a JSON list or object, is JSON: a list or lines of strings or objects with
    "text" (or "contents") and optionally "title", or one object that holds such a list as "ctxs", "passages" or "contexts". Anything else
    is plain text, one passage a line. Blank lines are skipped. gzip is accepted.

    Raises:
        PassageFileError: If it holds no passages, or none of these shapes.
        OSError: If it cannot be read.
    """
    shown = "standard input" if name == "-" else name
    try:
        with open_data(shown if name == "-" else name, sys.stdin.buffer if name == "-" else None) as file:
            lines = list(read_lines(file, shown))
        filled = [line for _, line in lines if line.strip()]
        is_json = re.search(r"\.jsonl?(\.gz)?$", name) is not None or (bool(filled) and _OPENS_JSON.match(filled[0]) is not None)
        passages: list[str | dict[str, Any]] = _from_json(iter(lines), shown) if is_json else [line.strip() for line in filled]
    except PassageFileError:
        raise
    except DataFileError as error:
        raise PassageFileError(str(error)) from error
    if not passages:
        raise PassageFileError(f"{shown}: wanted at least one passage, got none")
    return passages


def _from_json(lines: Iterator[tuple[int, str]], shown: str) -> list[str | dict[str, Any]]:
    values = list(json_values(lines, shown, ACCEPTED))
    lists = [(line, value) for line, value in values if isinstance(value, dict) and _list_name(value)]
    if lists and len(values) > 1:
        raise PassageFileError(
            f"{shown}:{lists[-1][0]}: wanted the passages of one question, got {len(values)} values; accepted: {ACCEPTED}"
        )
    if lists:
        line, value = lists[0]
        held = value[_list_name(value)]
        if not isinstance(held, list):
            raise PassageFileError(f"{shown}:{line}: {_list_name(value)}: wanted a list; accepted: {ACCEPTED}")
        values = [(line, element) for element in held]
    return [_passage(value, f"{shown}:{line}") for line, value in values]


def _list_name(value: dict[str, Any]) -> str:
    """The key under which an object holds passages; empty if it is a passage itself."""
    if any(name in value for name in _TEXTS):
        return ""
    return next((name for name in _LISTS if name in value), "")


def _passage(value: Any, where: str) -> str | dict[str, Any]:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise PassageFileError(f"{where}: wanted a passage, got a JSON {type(value).__name__}; accepted: {ACCEPTED}")
    text, title = next((value[name] for name in _TEXTS if name in value), None), value.get("title")
    if not isinstance(text, str):
        got = f"a {type(text).__name__} as text" if any(name in value for name in _TEXTS) else f"the keys {', '.join(value) or '(none)'}"
        raise PassageFileError(f"{where}: wanted a passage, got {got}; accepted: {ACCEPTED}")
    if title is not None and not isinstance(title, str):
        raise PassageFileError(f"{where}: title: wanted a string, got a JSON {type(title).__name__}; accepted: {ACCEPTED}")
    return {"text": text} if title is None else {"title": title, "text": text}
