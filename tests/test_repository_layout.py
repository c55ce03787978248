"""Promises about the files themselves: the README names each, none grows too long, nothing of one machine is in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRACKED = [
    ROOT / line
    for line in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    if line
]


def test_the_readme_names_every_module_of_the_server_and_the_export():
    readme = (ROOT / "README.md").read_text()
    for folder in ("export", "serving"):
        for path in (ROOT / folder).rglob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in readme, f"{folder}/{path.name} is not in the README's tree"


def test_the_readme_names_no_module_that_is_gone():
    names = {path.name for path in TRACKED}
    tree = (ROOT / "README.md").read_text().split("## How it works")[1]
    assert set(re.findall(r"\b[a-z_]+\.py\b", tree)) <= names


def test_no_source_is_longer_than_400_lines():
    sources = [path for path in TRACKED if path.suffix in (".py", ".cu", ".cuh", ".c")]
    assert [path.name for path in sources if len(path.read_text().splitlines()) > 400] == []


def test_serving_needs_neither_torch_nor_export():
    for path in (ROOT / "serving").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (torch|export|transformers)\b", path.read_text(), re.M), path.name


def test_what_travels_is_small():
    assert sum(path.stat().st_size for path in TRACKED if path.is_file()) < 24_000_000
