"""The passages of one question: a JSON, JSONL or plain text file -> passages for ReaderRequest. Needs only the standard library."""

import json
import sys
from typing import Any


class PassageFileError(ValueError):
    """A passage file that cannot be read; the message names the file and, if possible, the line."""


def read_passages(name: str) -> list[str | dict[str, Any]]:
    """The passages of a file, or of standard input if the name is "-".

    A name ending in .json, or content that opens with "[" and closes with "]", is a JSON list of strings or {"title", "text"}; a name
    ending in .jsonl is one such value per line; anything else is plain text, one passage per line. Blank lines are skipped.

    Raises:
        PassageFileError: If it holds no passages, or not the format of its name. ReaderRequest checks each passage.
        OSError: If it cannot be read.
    """
    shown = "standard input" if name == "-" else name
    if name == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(name, "rb") as file:
            content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PassageFileError(f"{shown}:{line}: wanted UTF-8, got the byte 0x{content[error.start]:02x}") from error

    # split at line feeds only: splitlines() would also split at the Unicode line separators in web text
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    stripped = text.strip()
    if name.endswith(".jsonl"):
        passages: Any = [_json(line, shown, number) for number, line in lines]
    elif name.endswith(".json") or (stripped.startswith("[") and stripped.endswith("]")):
        passages = _json(text, shown, 1)
    else:
        passages = [line for _, line in lines]
    if not isinstance(passages, list):
        raise PassageFileError(f'{shown}: wanted a list of strings or {{"title", "text"}}, got a JSON {type(passages).__name__}')
    if not passages:
        raise PassageFileError(f"{shown}: wanted at least one passage, got none")
    return passages


def _json(text: str, shown: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PassageFileError(f"{shown}:{first_line + error.lineno - 1}:{error.colno}: not JSON: {error.msg}") from error
