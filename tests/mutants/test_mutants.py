"""The mutation run itself: which places it changes, that a noticed change counts as killed, and that every module has tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import __main__ as command
from tests.mutants import targets
from tests.mutants.runner import TestRun

ROOT = Path(__file__).parents[2]


def changes(source: str) -> set[str]:
    """Every mutant of a one-line module, without white space at its ends."""
    variants = [variant for site in targets.mutation_sites(source) for variant in site.variants]
    return {text.strip() for variant in variants if (text := targets.mutated(source, variant)) is not None}


@pytest.mark.parametrize(
    ("source", "mutants"),
    [
        ("x = a < b", {"x = a <= b", "x = a >= b"}),
        ("x = a + b", {"x = a - b"}),
        ("x = a and not b", {"x = a or not b", "x = a and  b"}),
        ("x: int | None = None", set()),
        ("def f(a: int | None, *, b: float = x) -> int | None: ...", set()),
        ("x = dataclass(frozen=True, eq=True)", {"x = dataclass(frozen=True, eq=False)"}),
        ("zip(a, b, strict=True)", set()),
        ("f(*a, **b)", set()),
        ("try: x\nexcept (a.Error, E): y", {"try: x\nexcept (a.Error, CosmicRayTestingException): y"}),
        ("GROWTH = 4", set()),
        ("EOS_FORBIDDEN = -1e9", {"EOS_FORBIDDEN = +1e9"}),
        ("MAX_CACHE_BYTES = 8 << 30", {"MAX_CACHE_BYTES = 8 >> 30"}),
        ("FORMAT = 4", {"FORMAT = 3", "FORMAT = 5"}),
    ],
)
def test_changes_are_those_of_a_careless_programmer(source, mutants):
    assert changes(source) == mutants


def test_a_sample_depends_on_its_seed_alone_and_differs_from_the_module_in_the_stated_line():
    paths = targets.modules(ROOT, ("serving/contract",))
    first, again, other = (command.sample(paths, 8, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 8
    for mutant in first:
        before, after = mutant.original.splitlines(), mutant.source.splitlines()
        assert mutant.original == (ROOT / mutant.path).read_text()
        assert before != after and before[: mutant.line - 3] == after[: mutant.line - 3]


def test_every_module_in_the_scope_has_fast_tests():
    modules = targets.modules(ROOT)
    assert {module.rsplit("/", 1)[0] for module in modules} >= {
        "serving/contract",
        "serving/pipeline",
        "export/checkpoint",
        "export/tensorrt",
    }
    for module in modules:
        assert targets.tests_of(ROOT, module)
    with pytest.raises(LookupError, match=r"clients/metrics.py: wanted tests in TESTS_OF_MODULES"):
        targets.tests_of(ROOT, "clients/metrics.py")


def outcome_of(tree: Path, source: str, timeout_s: float) -> str:
    """Run the tree's one test against a module's source, as a mutation run does."""
    (tree / "serving" / "least.py").write_text(source)
    script = (
        "import sys; from pathlib import Path; from tests.mutants.runner import TestRun\n"
        f"print(TestRun(Path({str(tree)!r}), ('test_least.py',), Path({str(tree / 'log')!r}), {timeout_s}).wait())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_mutant_is_killed_by_a_failing_test_or_the_time_and_survives_otherwise(tmp_path):
    assert TestRun.__test__ is False
    source = "def least(values):\n    return min(values)\n"
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").touch()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    server\n    slow\n    gpu\n")
    (tmp_path / "test_least.py").write_text("from serving.least import least\ndef test_least():\n    assert least([2, 1]) == 1\n")
    assert outcome_of(tmp_path, source, 60) == "passed"
    assert outcome_of(tmp_path, source.replace("min", "max"), 60) == "failed"
    assert outcome_of(tmp_path, source.replace("return", "while True: pass\n    return"), 5) == "timed out"


def test_survivors_are_listed_with_their_reasons_and_the_score_counts_them(tmp_path):
    killed = command.tried_mutant("a.py", 1, "x = 1\n", "x = 2\n", "failed")
    late = command.tried_mutant("a.py", 2, "while x:\n", "while not x:\n", "timed out")
    survivor = command.tried_mutant("b.py", 2, "a\nif  b < c:\n", "a\nif  b <= c:\n", "passed")
    reasons = {("b.py", "if b < c:", "if b <= c:"): "equivalent: b is never c"}
    assert command.score_line([killed, late, survivor]) == "mutants: 3 tried, 2 killed, 66.7%"
    assert command.survivors_text([killed, survivor], {}) == "survived  b.py:2: if b < c:  ->  if b <= c:"
    command.write_notes(tmp_path / "notes.md", [killed, late, survivor], reasons, "--seed 0")
    text = (tmp_path / "notes.md").read_text()
    assert "| a.py | 2 | 2 |" in text and "| b.py | 1 | 0 |" in text
    assert "- b.py:2: `if b < c:` -> `if b <= c:`: equivalent: b is never c" in text
