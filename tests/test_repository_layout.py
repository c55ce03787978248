"""Promises about the files themselves: none grows too long, no folder too full, the repository stays small."""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.architecture import PAGE, TABLE, module_table

ROOT = Path(__file__).parents[1]
TRACKED = [
    ROOT / line
    for line in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    if line
]


def test_no_source_is_longer_than_400_lines():
    sources = [path for path in TRACKED if path.suffix in (".py", ".cu", ".cuh", ".c")]
    assert [path.name for path in sources if len(path.read_text().splitlines()) > 400] == []


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the tree's pyproject.toml."""
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-c", command], cwd=tree, env=environment, capture_output=True, text=True)


def test_packages_import_only_what_they_may():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_import_contract_notices_an_import_that_it_forbids(tmp_path):
    for package in ("serving", "export", "perf", "training", "clients", "examples", "offline"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=lambda _, names: [n for n in names if "." in n and not n.endswith(".py")]
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    forbidden = {
        "serving/launcher/liveness.py": "import torch",
        "serving/contract/limits.py": "import serving.engines.base",
        "serving/pipeline/request.py": "import serving.launcher.server",
        "perf/bounds/statistics.py": "import triton_python_backend_utils",
        "clients/fido_client/metrics.py": "import serving.contract.manifest",
        "export/checkpoint/config.py": "import serving.pipeline.prompt",
        "training/fit/batches.py": "import perf.bounds.cost",
        "offline/readers.py": "import export.build",
    }
    for module, line in forbidden.items():
        path = tmp_path / module
        path.write_text(path.read_text() + f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert f"Contracts: 0 kept, {len(forbidden)} broken." in done.stdout, done.stdout


def test_what_travels_is_small():
    assert sum(path.stat().st_size for path in TRACKED if path.is_file()) < 24_000_000


def test_no_folder_has_more_than_14_modules():
    modules = collections.Counter(path.parent for path in TRACKED if path.suffix == ".py")
    assert {str(folder): count for folder, count in modules.items() if count > 14} == {}


def test_the_repository_stays_small():
    assert len(TRACKED) <= 455


def test_the_readme_is_short_and_the_docs_say_whom_they_are_for():
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(readme) <= 120
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        lines = page.read_text().splitlines()
        assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == [], page.name
        if page.name != "README.md":
            assert lines[2].startswith("For people who") or lines[2].startswith("For people with"), page.name


def test_links_of_the_readme_and_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


# docs/architecture.md names every module, with what its docstring says, and no module that is gone.


def test_the_table_of_modules_is_that_of_the_tree():
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found and found[0] == module_table(), "run python -m tests.architecture"


def test_every_module_says_what_it_does_in_one_line():
    rows = [row for row in module_table().splitlines()[2:]]
    assert len(rows) > 40
    assert [row for row in rows if re.search(r"\| +\|$", row)] == []


def test_the_two_lives_name_files_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    lives = text[text.index("## A request's life") : text.index("## Modules")]
    assert lives.count("\n10. ") == 2, "ten steps each"
    named = set(re.findall(r"`((?:serving|export)/[\w/]+\.py)`", lives))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).is_file()] == []
