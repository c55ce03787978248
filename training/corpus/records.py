"""The corpus's files: JSON lines, and the human-written questions of the repository."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

REAL_QUESTIONS = pathlib.Path(__file__).parents[1] / "data" / "real_questions.json"


def normalized_question(question: str) -> str:
    """A question's words alone, to tell whether two are the same."""
    return " ".join(re.findall(r"\w+", question.lower()))


def real_questions() -> list[dict[str, Any]]:
    """The human-written questions that stand in the repository."""
    return json.loads(REAL_QUESTIONS.read_text(encoding="utf-8"))


def write_jsonl(file: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes one JSON object a line, in one step; returns how many."""
    beside = file.with_name(file.name + ".part")
    count = 0
    with beside.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    os.replace(beside, file)
    return count


def read_jsonl(file: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        FileNotFoundError: If it is not there, with the command that makes it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a corpus file is made by: python -m training corpus")
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]
