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
    """The words of a question in lower case, to compare questions."""
    return " ".join(re.findall(r"\w+", question.lower()))


def real_questions() -> list[dict[str, Any]]:
    """The human-written questions of the repository."""
    return json.loads(REAL_QUESTIONS.read_text(encoding="utf-8"))


def write_jsonl(file: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line, atomically; return the number of lines."""
    partial = file.with_name(file.name + ".part")
    count = 0
    with partial.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    os.replace(partial, file)
    return count


def read_jsonl(file: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        FileNotFoundError: If it does not exist; the message names the command that builds it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; build the corpus with: python -m training corpus")
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]
