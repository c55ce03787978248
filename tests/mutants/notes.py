"""What a mutation run found, as text: tried mutants -> the list of survivors, docs/notes/mutants.md and the score line."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
from pathlib import Path

REASONS = Path(__file__).with_name("accepted.json")


@dataclasses.dataclass(frozen=True)
class Tried:
    """One mutant that was tried.

    Attributes:
        path: Of the module, relative to the repository's root.
        line: Of the change.
        before: The changed lines as they are, stripped.
        after: The same lines of the mutant.
        outcome: `passed` (it survived), `failed` or `timed out`.
    """

    path: str
    line: int
    before: str
    after: str
    outcome: str

    @property
    def survived(self) -> bool:
        """Whether no test noticed."""
        return self.outcome == "passed"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after or '(removed)'}"


def tried(path: str, line: int, original: str, mutant: str, outcome: str) -> Tried:
    """The record of one mutant, with the lines that differ."""
    changes = [text for text in difflib.ndiff(original.splitlines(), mutant.splitlines()) if text[:2] in ("- ", "+ ")]
    before, after = (" ".join(" ".join(text[2:].split()) for text in changes if text.startswith(sign)) for sign in "-+")
    return Tried(path, line, before, after, outcome)


def load_reasons(path: Path = REASONS) -> dict[tuple[str, str, str], str]:
    """(module, before, after) -> why no test can or need notice: `equivalent: ...` or `accepted: ...`."""
    if not path.is_file():
        return {}
    return {(entry["path"], entry["before"], entry["after"]): entry["why"] for entry in json.loads(path.read_text(encoding="utf-8"))}


def score_line(results: list[Tried]) -> str:
    """`mutants: N tried, K killed, P%`; survivors with a reason count as survivors."""
    killed = sum(not result.survived for result in results)
    return f"mutants: {len(results)} tried, {killed} killed, {100 * killed / max(1, len(results)):.1f}%"


def survivors_text(results: list[Tried], reasons: dict[tuple[str, str, str], str]) -> str:
    """One line for each survivor, with its reason if there is one."""
    survivors = sorted((result for result in results if result.survived), key=lambda result: (result.path, result.line))
    lines = [f"survived  {result}{_reason(result, reasons, '  # ')}" for result in survivors]
    return "\n".join(lines) if lines else "no survivors"


def write(path: Path, results: list[Tried], reasons: dict[tuple[str, str, str], str], settings: str) -> None:
    """Write the notes as Markdown."""
    by_module: dict[str, list[Tried]] = collections.defaultdict(list)
    for result in sorted(results, key=lambda result: (result.path, result.line)):
        by_module[result.path].append(result)
    lines = [
        "# Mutants",
        "",
        f"`python -m tests.mutants {settings}`",
        "",
        "`make mutants` changes the code in one place at a time with cosmic-ray's operators and runs the fast tests of that module.",
        "A survivor is a change that no test noticed; a time-out counts as killed.",
        "`frozen=`, `slots=`, `strict=`, `kw_only=` and type annotations are not changed.",
        "",
        f"**{score_line(results)}**",
        "",
        "| module | tried | killed |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {len(found)} | {sum(not result.survived for result in found)} |" for name, found in by_module.items()]
    lines += ["", "## Survivors", ""]
    for found in by_module.values():
        for result in found:
            if result.survived:
                why = _reason(result, reasons, "") or "no test yet"
                lines.append(f"- {result.path}:{result.line}: `{result.before}` -> `{result.after or '(removed)'}`: {why}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _reason(result: Tried, reasons: dict[tuple[str, str, str], str], prefix: str) -> str:
    reason = reasons.get((result.path, result.before, result.after))
    return f"{prefix}{reason}" if reason else ""
