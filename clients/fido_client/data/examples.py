"""FiD's data format: a JSON or JSONL file -> Examples. Needs only the standard library.

An example is {"question", "answers": [...], "ctxs": [{"title", "text"}]}, and optionally "id", "target" and each context's "id" and
"score"; other keys are ignored. A file holds a JSON list of examples, one example a line, or one example; the content decides, not the
file's name. Other tools' names are accepted: "answer" for answers, "passages" or "contexts" for ctxs, "contents" for text, and a string for
a passage without a title.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from .json_values import DataFileError, json_values, open_data, read_lines

ACCEPTED = 'a JSON list of {"question", "answers": [...], "ctxs": [{"title", "text"}]}, or one such object a line'


class ExampleError(DataFileError):
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
    try:
        with open_data(path) as file:
            elements = json_values(read_lines(file, path), path, ACCEPTED)
            for index, (line, element) in enumerate(itertools.islice(elements, limit)):
                yield example_from(element, str(index), n_context=n_context, where=f"{path}:{line}")
    except ExampleError:
        raise
    except DataFileError as error:
        raise ExampleError(str(error)) from error


def example_from(element: Any, default_id: str, *, n_context: int | None = None, where: str) -> Example:
    """One example from its JSON value; for `n_context` see `read_examples`.

    Args:
        element: The JSON value.
        default_id: The id of an example that has none.
        n_context: Maximum number of contexts; None: all.
        where: Its file and line, for messages.

    Raises:
        ExampleError: If it is not an example; the message names all faults.
    """
    faults: list[str] = []
    if not isinstance(element, dict):
        raise ExampleError(f"{where}: wanted an object with question, answers and ctxs, got {_kind(element)}; accepted: {ACCEPTED}")
    if not {"question", "ctxs", "passages", "contexts"} & set(element):
        raise ExampleError(f"{where}: wanted question, answers and ctxs, got the keys {_keys(element)}; accepted: {ACCEPTED}")
    question = element.get("question")
    if not isinstance(question, str):
        faults.append(f"question: wanted a string, got {_kind(question)}")
    target = element.get("target")
    if target is not None and not isinstance(target, str):
        faults.append(f"target: wanted a string, got {_kind(target)}")
    answers = _first_of(element, ("answers", "answer"), [] if target is None else [target])
    if isinstance(answers, str) and "answers" not in element:
        answers = [answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        faults.append("answers: wanted a list of strings")
    ctxs = _first_of(element, ("ctxs", "passages", "contexts"), None)
    if not isinstance(ctxs, list):
        faults.append(f"ctxs: wanted a list of passages, got {_kind(ctxs)}")
    contexts = [_context(ctx, f"ctxs[{number}]", faults) for number, ctx in enumerate(ctxs if isinstance(ctxs, list) else [])]
    if faults:
        raise ExampleError(f"{where}: {'; '.join(faults)}")
    if all(context.score is not None for context in contexts):
        contexts.sort(key=lambda context: -(context.score or 0.0))
    identifier = element.get("id")
    return Example(
        id=default_id if identifier is None else str(identifier),
        question=element["question"],
        answers=tuple(answers),
        contexts=tuple(contexts[:n_context]),
        target=target,
    )


def _context(ctx: Any, name: str, faults: list[str]) -> Context:
    if isinstance(ctx, str):
        return Context(ctx)
    if not isinstance(ctx, dict):
        faults.append(f"{name}: wanted a string or an object with title and text, got {_kind(ctx)}")
        return Context("")
    text, title, score = _first_of(ctx, ("text", "contents"), None), ctx.get("title"), ctx.get("score")
    if not isinstance(text, str):
        faults.append(f"{name}.text: wanted a string, got {_kind(text)}")
    if title is not None and not isinstance(title, str):
        faults.append(f"{name}.title: wanted a string, got {_kind(title)}")
    try:
        # DPR writes scores as strings, which FiD accepts
        number = None if score is None else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and math.isnan(number):
        faults.append(f"{name}.score: wanted a number, got {score!r}")
    return Context(text if isinstance(text, str) else "", title, number)


def _first_of(element: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value of the first of the names that the object has."""
    return next((element[name] for name in names if name in element), default)


def _keys(element: Mapping[str, Any]) -> str:
    return ", ".join(list(element)[:5]) or "of an empty object"


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "nothing"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
