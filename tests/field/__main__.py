"""`python -m tests.field [pytest's options]`: the tests of every row, and how many rows pass. 0 if all of them do.

A test is of the row that its name begins with: test_b4_... of B4, test_f_... of section F. A row without a test fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# The list of rows lies outside the repository, so their number is written here: a row without a test must fail.
SECTIONS = {"A": 6, "B": 14, "C": 11, "D": 3, "E": 6}  # rows of each; F has no numbers
ROWS = [f"{section}{row}" for section, rows in SECTIONS.items() for row in range(1, rows + 1)] + ["F"]


class Rows:
    """Collects the outcome of each row's tests."""

    def __init__(self) -> None:
        self.outcomes: dict[str, set[str]] = {row: set() for row in ROWS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for every phase of every test."""
        found = re.search(r"::test_([a-f]\d*)_", report.nodeid)
        if found and found[1].upper() in self.outcomes and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[found[1].upper()].add(report.outcome)


def main() -> int:
    """Make the demo readers and their corpus, run the tests, print a line per row that does not pass, and the count."""
    subprocess.run(["make", "demo-readers", "build/corpus/heldout.jsonl"], cwd=Path(__file__).parents[2], check=True)
    rows = Rows()
    pytest.main([str(Path(__file__).parent), *sys.argv[1:]], plugins=[rows])
    passed = {row for row, outcomes in rows.outcomes.items() if "passed" in outcomes and "failed" not in outcomes}
    for row in ROWS:
        if row not in passed:
            print(f"{row}: {', '.join(sorted(rows.outcomes[row])) or 'no test'}")
    print(f"field: {len(ROWS)} rows, {len(passed)} passed")
    return 0 if len(passed) == len(ROWS) else 1


if __name__ == "__main__":
    sys.exit(main())
