"""The JSON values of a data file: one list, one value a line, or one object -> (line number, value) one by one.

It reads UTF-8 with or without a byte order mark, Unix and Windows line ends, and gzip. A comma after the last element of the list, or after
the value of a line, is accepted. Needs only the standard library.
"""

from __future__ import annotations

import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

_OTHER_FORMATS = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PAR1": "Parquet",
    b"\x80\x04": "a pickle",
}
_GIT_LFS = b"version https://git-lfs.github.com"
_SHOWN_CHARACTERS = 20


class DataFileError(ValueError):
    """A data file that cannot be read; the message names the file and, if possible, the line."""


def open_data(name: str | pathlib.Path, stream: BinaryIO | None = None) -> BinaryIO:
    """The file, or the stream that stands for it, decompressed if it is gzip.

    Raises:
        DataFileError: If it is of another kind than text or gzip.
        OSError: If it cannot be opened.
    """
    opened = open(name, "rb") if stream is None else stream
    file: Any = opened if isinstance(opened, io.BufferedReader) else io.BufferedReader(opened)
    head = file.peek(64)[:64]
    if head.startswith(_GIT_LFS):
        raise DataFileError(f"{name}: wanted data, got a git-lfs pointer: run git lfs pull")
    for magic, kind in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise DataFileError(f"{name}: wanted UTF-8 text or gzip, got {kind}")
    if not head.startswith(b"\x1f\x8b"):
        return file
    if stream is not None:
        return gzip.open(file)  # type: ignore[return-value]
    file.close()
    return gzip.open(name)  # type: ignore[return-value]


def read_lines(file: BinaryIO, name: str | pathlib.Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line, with its line feed.

    Raises:
        DataFileError: If a line is not UTF-8, or the gzip data are damaged.
    """
    number = 0
    try:
        for number, content in enumerate(file, start=1):
            try:
                yield number, content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataFileError(f"{name}:{number}: wanted UTF-8, got the byte 0x{content[error.start]:02x}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataFileError(f"{name}: the gzip data are damaged after line {number}: {error}") from error


def json_values(lines: Iterator[tuple[int, str]], name: str | pathlib.Path, accepted: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each element of a JSON list, or of each line, or of the one object that all lines hold.

    Lines are read no further than the values that are taken, unless the lines hold one list or one object.

    Args:
        lines: Numbers and texts, as from `read_lines`.
        name: The file's name, for messages.
        accepted: The shapes that the caller accepts, for messages.

    Raises:
        DataFileError: If the text is not JSON, or goes on after the list's or the object's end.
    """
    filled = ((number, line) for number, line in lines if line.strip())
    first = next(filled, None)
    if first is None:
        return
    number, line = first
    document = _Document(name, accepted)
    if line.lstrip().startswith("["):
        yield from document.elements(number, _rest(first, filled))
        return
    try:
        json.loads(line.strip().removesuffix(","))
    except json.JSONDecodeError as error:
        if (
            line.lstrip().startswith("{") and error.pos >= len(line.strip().removesuffix(",")) - 1
        ):  # an object that goes on in the next line
            yield document.single(number, _rest(first, filled))
            return
    except (RecursionError, ValueError):
        pass  # reported below
    for number, line in _chained(first, filled):
        yield number, document.value(number, line)


class _Document:
    """A file's JSON, with messages that name the file and the line."""

    def __init__(self, name: str | pathlib.Path, accepted: str) -> None:
        self._name = name
        self._accepted = accepted

    def value(self, number: int, line: str) -> Any:
        """The value of one line."""
        text = line.strip()
        try:
            return json.loads(text.removesuffix(","))
        except json.JSONDecodeError as error:
            column = len(line) - len(line.lstrip()) + error.colno
            raise self._error(number, f"not JSON: {error.msg}; accepted: {self._accepted}", column) from error
        except (RecursionError, ValueError) as error:
            raise self._error(number, f"not JSON that can be read: {_reason(error)}") from error

    def single(self, first: int, text: str) -> tuple[int, Any]:
        """The one value of a text."""
        start = _skip_space(text, 0)
        value, end = self._decode(first, text, start)
        if _skip_space(text, end) != len(text):
            raise self._trailing(first, text, end, "the object's end")
        return first, value

    def elements(self, first: int, text: str) -> Iterator[tuple[int, Any]]:
        """Line number and value of every element of the list; json.loads would lose the line numbers."""
        line, counted = first, 0
        position = _skip_space(text, _skip_space(text, 0) + 1)
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            value, position = self._decode(first, text, position)
            yield line, value
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                got = repr(text[position : position + _SHOWN_CHARACTERS]) if text[position:] else "the file's end"
                raise self._error(_line_of(first, text, position), f"wanted a comma or the list's end, got {got}")
        if _skip_space(text, position + 1) != len(text):
            raise self._trailing(first, text, position + 1, "the list's end")

    def _decode(self, first: int, text: str, position: int) -> tuple[Any, int]:
        try:
            return json.JSONDecoder().raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise self._error(first + error.lineno - 1, f"not JSON: {error.msg}; accepted: {self._accepted}", error.colno) from error
        except (RecursionError, ValueError) as error:
            raise self._error(_line_of(first, text, position), f"not JSON that can be read: {_reason(error)}") from error

    def _trailing(self, first: int, text: str, position: int, end: str) -> DataFileError:
        position = _skip_space(text, position)
        found = text[position : position + _SHOWN_CHARACTERS].split("\n")[0]
        return self._error(_line_of(first, text, position), f"wanted nothing after {end}, got {found!r}; accepted: {self._accepted}")

    def _error(self, line: int, problem: str, column: int | None = None) -> DataFileError:
        return DataFileError(f"{self._name}:{line}:{'' if column is None else f'{column}:'} {problem}")


def _chained(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _rest(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> str:
    """All lines as one text in which each line has kept its number."""
    number, parts = first[0], []
    for at, line in _chained(first, rest):
        parts += ["\n" * (at - number), line]
        number = at + 1
    return "".join(parts)


def _line_of(first: int, text: str, position: int) -> int:
    return first + text.count("\n", 0, position)


def _skip_space(text: str, position: int) -> int:
    """The position of the next character that is not JSON's white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
