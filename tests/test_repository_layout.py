"""Promises about the files themselves: none grows too long, no folder too full, the repository stays small."""

from __future__ import annotations

import collections
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRACKED = [
    ROOT / line
    for line in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    if line
]


def test_no_source_is_longer_than_400_lines():
    sources = [path for path in TRACKED if path.suffix in (".py", ".cu", ".cuh", ".c")]
    assert [path.name for path in sources if len(path.read_text().splitlines()) > 400] == []


def test_serving_needs_neither_torch_nor_export():
    for path in (ROOT / "serving").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (torch|export|transformers)\b", path.read_text(), re.M), path.name


def test_what_travels_is_small():
    assert sum(path.stat().st_size for path in TRACKED if path.is_file()) < 24_000_000


def test_no_folder_has_more_than_14_modules():
    modules = collections.Counter(path.parent for path in TRACKED if path.suffix == ".py")
    assert {str(folder): count for folder, count in modules.items() if count > 14} == {}


def test_the_repository_has_at_most_360_files():
    assert len(TRACKED) <= 360
