"""FiD's data format: a JSON or JSONL file -> Examples. Needs only the standard library.

An example is {"question", "answers": [...], "ctxs": [{"title", "text"}]}, and optionally "id", "target" and each context's "id" and
"score"; other keys are ignored. A .json file holds a list of examples, a .jsonl file one per line; for any other name the first
character decides.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any


class ExampleError(ValueError):
    """A data file that is not in FiD's format; the message names the file and the line."""


@dataclasses.dataclass(frozen=True)
class Context:
    """One retrieved passage.

    Attributes:
        text: Its text.
        title: Its title; None if the data have none.
        score: The retriever's score, higher is better; None if the data have none.
    """

    text: str
    title: str | None = None
    score: float | None = None

    def as_passage(self) -> dict[str, str]:
        """The passage in the form that ReaderRequest accepts."""
        return {"text": self.text} if self.title is None else {"text": self.text, "title": self.title}


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its answers and passages.

    Attributes:
        id: The data's id as a string; else the example's index in the file, as in FiD.
        question: The question.
        answers: Every right answer; if the data have only a "target", that one; empty if none is known.
        contexts: The passages, best first.
        target: The answer to train on, if the data name one.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    contexts: tuple[Context, ...]
    target: str | None = None


def read_examples(path: str | pathlib.Path, *, n_context: int | None = None, limit: int | None = None) -> Iterator[Example]:
    """The examples of a file, in file order.

    As in FiD, contexts are sorted by score, highest first and ties in file order, if every context of the example has a score; else they
    keep the file's order. They are truncated to `n_context` after sorting.

    Args:
        path: The file.
        n_context: Maximum number of contexts of each example; None: all.
        limit: Maximum number of examples; the rest of the file is not checked.

    Yields:
        One Example at a time; a JSONL file is read no further than that.

    Raises:
        ExampleError: If the file is not in the format.
        OSError: If it cannot be read.
    """
    for name, value in (("n_context", n_context), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: wanted a whole number from 1, or None, got {value}")
    return _examples(pathlib.Path(path), n_context, limit)


def _examples(path: pathlib.Path, n_context: int | None, limit: int | None) -> Iterator[Example]:
    elements = _json_lines(path) if _is_jsonl(path) else _json_list(path)
    for index, (line, element) in enumerate(itertools.islice(elements, limit)):
        yield _example(element, index, n_context, f"{path}:{line}")


def _is_jsonl(path: pathlib.Path) -> bool:
    if path.suffix in (".json", ".jsonl"):
        return path.suffix == ".jsonl"
    with path.open("rb") as file:
        return not file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of every line that is not blank."""
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            text = _decoded(content, path, line)
            if not text.strip():
                continue
            try:
                yield line, json.loads(text)
            except json.JSONDecodeError as error:
                raise ExampleError(f"{path}:{line}:{error.colno}: wanted one JSON object a line: {error.msg}") from error


def _json_list(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of every element of the list that the file holds.

    Decoded element by element, because json.load loses the line numbers, which error messages need.
    """
    content = path.read_bytes()
    text = _decoded(content, path, 1)
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def line_at(position: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ExampleError(f"{path}:{line_at(position)}: wanted a JSON list of examples; one a line belongs into a .jsonl file")
    position = _skip_space(text, position + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        start = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ExampleError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
        yield line_at(start), value
        position = _skip_space(text, position)
        if text[position : position + 1] == "]":
            return
        if text[position : position + 1] != ",":
            raise ExampleError(f"{path}:{line_at(position)}: wanted a comma or the list's end, got {text[position : position + 20]!r}")
        position = _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    return json.decoder.WHITESPACE.match(text, position).end()  # type: ignore[attr-defined]


def _decoded(content: bytes, path: pathlib.Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = line + content.count(b"\n", 0, error.start)
        raise ExampleError(f"{path}:{at}: wanted UTF-8, got the byte 0x{content[error.start]:02x}") from error


def _example(element: Any, index: int, n_context: int | None, where: str) -> Example:
    faults: list[str] = []
    if not isinstance(element, dict):
        raise ExampleError(f"{where}: wanted an object with question, answers and ctxs, got {_kind(element)}")
    question = element.get("question")
    if not isinstance(question, str):
        faults.append(f"question: wanted a string, got {_kind(question)}")
    target = element.get("target")
    if not isinstance(target, str | None):
        faults.append(f"target: wanted a string, got {_kind(target)}")
    answers = element.get("answers", [] if target is None else [target])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        faults.append("answers: wanted a list of strings")
    ctxs = element.get("ctxs")
    if not isinstance(ctxs, list):
        faults.append(f"ctxs: wanted a list of passages, got {_kind(ctxs)}")
    contexts = [_context(ctx, f"ctxs[{number}]", faults) for number, ctx in enumerate(ctxs if isinstance(ctxs, list) else [])]
    if faults:
        raise ExampleError(f"{where}: {'; '.join(faults)}")
    if all(context.score is not None for context in contexts):
        contexts.sort(key=lambda context: -(context.score or 0.0))
    identifier = element.get("id")
    return Example(
        id=str(index if identifier is None else identifier),
        question=element["question"],
        answers=tuple(answers),
        contexts=tuple(contexts[:n_context]),
        target=target,
    )


def _context(ctx: Any, name: str, faults: list[str]) -> Context:
    if not isinstance(ctx, dict):
        faults.append(f"{name}: wanted an object with title and text, got {_kind(ctx)}")
        return Context("")
    text, title, score = ctx.get("text"), ctx.get("title"), ctx.get("score")
    if not isinstance(text, str):
        faults.append(f"{name}.text: wanted a string, got {_kind(text)}")
    if not isinstance(title, str | None):
        faults.append(f"{name}.title: wanted a string, got {_kind(title)}")
    try:
        # DPR writes scores as strings, which FiD accepts
        number = None if score is None else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and math.isnan(number):
        faults.append(f"{name}.score: wanted a number, got {score!r}")
    return Context(text or "", title, number)


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "nothing"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
