"""The table of modules in docs/architecture.md, from the modules' docstrings. `python -m tests.architecture` writes it."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("serving", "export")
TABLE = re.compile(r"(?<=## Modules\n\n).*?(?=\n## )", re.S)


def module_table() -> str:
    """One line a module of the packages that a request and a checkpoint pass through."""
    listed = subprocess.run(["git", "ls-files", *(f"{package}/*.py" for package in PACKAGES)], cwd=ROOT, capture_output=True, text=True)
    lines = ["| module | what it does |", "|---|---|"]
    for name in sorted(listed.stdout.split()):
        if not name.endswith("__init__.py") and (ROOT / name).is_file():
            docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
            lines.append(f"| `{name}` | {docstring.splitlines()[0] if docstring else ''} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: module_table(), text), encoding="utf-8")
