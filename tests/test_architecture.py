"""docs/architecture.md names every module, with what its docstring says, and no module that is gone."""

from __future__ import annotations

import re

from tests.architecture import PAGE, ROOT, TABLE, module_table


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
