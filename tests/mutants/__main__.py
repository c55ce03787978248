"""`python -m tests.mutants`: change the code in one place at a time and see whether the fast tests notice.

In: a seed, a sample size, a time limit, and optionally paths. Out: every survivor, build/mutants.md, and as the last line
`mutants: N tried, K killed, P%`. Tests that run out of time run once more, alone: a busy machine kills no mutant, an endless loop does.
Exit codes: 0 the run is complete, 1 the tests fail without a mutant, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.mutants import runner, targets

ROOT = Path(__file__).parents[2]
NOTES = Path("build/mutants.md")
SURVIVED, TIMED_OUT = "passed", "timed out"
TIMEOUT_FACTOR, TIMEOUT_EXTRA_S = 4.0, 20.0  # of the unmutated tests' time
BASELINE_TIMEOUT_S = 900.0
EXPORTING_TESTS = ("tests/serving/pipeline/test_in_flight.py",)
ENGINES_VARIABLE = "TEST_ENGINES"  # tests/conftest.py keeps its exported engines there: no mutated module takes part in their export


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One changed module.

    Attributes:
        path: Of the module, relative to the repository's root.
        line: Of the change.
        original: The module's source.
        source: The changed source.
    """

    path: str
    line: int
    original: str
    source: str


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
        return self.outcome == SURVIVED

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after or '(removed)'}"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    paths = targets.modules(ROOT, tuple(args.paths))
    if not paths:
        print(f"--paths: wanted paths at or below {', '.join(targets.TESTS_OF_MODULES)}, got {' '.join(args.paths)}", file=sys.stderr)
        return 2
    chosen = sample(paths, args.sample, args.seed)
    runner.preload()
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        os.environ[ENGINES_VARIABLE] = str(Path(scratch) / "engines")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        copies = [Path(scratch) / f"copy{index}" for index in range(args.workers)]
        for copy in copies:
            runner.copy_tree(ROOT, copy)
        started_s = time.monotonic()
        timeouts_s = _baselines(copies, {targets.tests_of(ROOT, mutant.path) for mutant in chosen}, args.verbose)
        if timeouts_s is None:
            return 1
        tried = list(_try_all(chosen, copies, timeouts_s, started_s + args.minutes * 60))
    accepted = targets.ACCEPTED
    print(survivors_text(tried, accepted))
    out = args.notes
    settings = f"--seed {args.seed} --sample {args.sample} --minutes {args.minutes:g}"
    settings += f" --paths {' '.join(args.paths)}" if args.paths else ""
    write_notes(ROOT / out, tried, accepted, settings)
    print(f"written: {out}")
    print(score_line(tried))
    return 0


def sample(paths: list[str], count: int, seed: int) -> list[Mutant]:
    """At most `count` mutants, one at a site, drawn without replacement from the sites of all modules; the same ones for the same seed."""
    numbers = random.Random(seed)
    originals = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    everywhere = [(path, site) for path, original in originals.items() for site in targets.mutation_sites(original)]
    numbers.shuffle(everywhere)
    chosen: list[Mutant] = []
    for path, site in everywhere:
        if len(chosen) == count:
            break
        source = targets.mutated(originals[path], numbers.choice(site.variants))
        if source is not None:
            chosen.append(Mutant(path, site.line, originals[path], source))
    return chosen


def _baselines(copies: list[Path], groups: set[tuple[str, ...]], verbose: bool) -> dict[tuple[str, ...], float] | None:
    """Time-outs in seconds for each group of tests, from runs without a mutant, one in each copy at a time; None if one fails."""
    warm_up = runner.TestRun(copies[0], EXPORTING_TESTS, copies[0].with_suffix(".log"), BASELINE_TIMEOUT_S)
    warm_up.wait()  # exports the engines, which the runs below and the mutants' runs then find
    waiting, timeouts_s = collections.deque(sorted(groups)), {}
    running: dict[Path, tuple[tuple[str, ...], runner.TestRun]] = {}
    while waiting or running:
        for copy in copies:
            if copy not in running and waiting:
                tests = waiting.popleft()
                running[copy] = tests, runner.TestRun(copy, tests, copy.with_suffix(".log"), BASELINE_TIMEOUT_S)
        for copy, (tests, run) in list(running.items()):
            outcome = run.outcome()
            if outcome is None:
                continue
            del running[copy]
            if outcome != SURVIVED:
                print(copy.with_suffix(".log").read_text(errors="replace"), file=sys.stderr)
                print(f"error: the tests {outcome} without a mutant: {' '.join(tests)}", file=sys.stderr)
                for _, other in running.values():
                    other.close()
                return None
            timeouts_s[tests] = TIMEOUT_FACTOR * run.elapsed_s() + TIMEOUT_EXTRA_S
            if verbose:
                print(f"{run.elapsed_s():.1f} s without a mutant: {' '.join(tests)}", flush=True)
        time.sleep(runner.POLL_S)
    return timeouts_s


def _try_all(mutants: list[Mutant], copies: list[Path], timeouts_s: dict[tuple[str, ...], float], deadline_s: float) -> Iterator[Tried]:
    """Try the mutants in their order, one in each copy at a time; none is started after the deadline."""
    late: list[Mutant] = []
    for mutant, outcome, elapsed_s in _outcomes(mutants, copies, timeouts_s, deadline_s):
        if outcome == TIMED_OUT:
            late.append(mutant)
        else:
            yield _told(mutant, outcome, elapsed_s)
    for mutant, outcome, elapsed_s in _outcomes(late, copies[:1], timeouts_s):
        yield _told(mutant, outcome, elapsed_s)


def _told(mutant: Mutant, outcome: str, elapsed_s: float) -> Tried:
    tried = tried_mutant(mutant.path, mutant.line, mutant.original, mutant.source, outcome)
    print(f"{outcome:9} {elapsed_s:5.1f} s  {tried}", flush=True)
    return tried


def _outcomes(
    mutants: list[Mutant], copies: list[Path], timeouts_s: dict[tuple[str, ...], float], deadline_s: float = math.inf
) -> Iterator[tuple[Mutant, str, float]]:
    """Each mutant with its outcome and the seconds that its tests took."""
    waiting = collections.deque(mutants)
    running: dict[Path, tuple[Mutant, runner.TestRun]] = {}
    try:
        while running or (waiting and time.monotonic() < deadline_s):
            for copy in copies:
                if copy not in running and waiting and time.monotonic() < deadline_s:
                    mutant = waiting.popleft()
                    (copy / mutant.path).write_text(mutant.source, encoding="utf-8")
                    tests = targets.tests_of(ROOT, mutant.path)
                    running[copy] = mutant, runner.TestRun(copy, tests, copy.with_suffix(".log"), timeouts_s[tests])
            for copy, (mutant, run) in list(running.items()):
                outcome = run.outcome()
                if outcome is not None:
                    del running[copy]
                    (copy / mutant.path).write_text(mutant.original, encoding="utf-8")
                    yield mutant, outcome, run.elapsed_s()
            time.sleep(runner.POLL_S)
    finally:
        for _, run in running.values():
            run.close()


def tried_mutant(path: str, line: int, original: str, mutant: str, outcome: str) -> Tried:
    """The record of one mutant, with the lines that differ."""
    changes = [text for text in difflib.ndiff(original.splitlines(), mutant.splitlines()) if text[:2] in ("- ", "+ ")]
    before, after = (" ".join(" ".join(text[2:].split()) for text in changes if text.startswith(sign)) for sign in "-+")
    return Tried(path, line, before, after, outcome)


def score_line(results: list[Tried]) -> str:
    """`mutants: N tried, K killed, P%`; survivors with a reason count as survivors."""
    killed = sum(not result.survived for result in results)
    return f"mutants: {len(results)} tried, {killed} killed, {100 * killed / max(1, len(results)):.1f}%"


def survivors_text(results: list[Tried], reasons: dict[tuple[str, str, str], str]) -> str:
    """One line for each survivor, with its reason if there is one."""
    survivors = sorted((result for result in results if result.survived), key=lambda result: (result.path, result.line))
    lines = [f"survived  {result}{_reason(result, reasons, '  # ')}" for result in survivors]
    return "\n".join(lines) if lines else "no survivors"


def write_notes(path: Path, results: list[Tried], reasons: dict[tuple[str, str, str], str], settings: str) -> None:
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
        "A survivor is a change that no test noticed. Tests that ran out of time twice, the second time alone, noticed.",
        "`frozen=`, `slots=`, `strict=`, `kw_only=`, type annotations and numbers that only decide speed are not changed.",
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Change the code in one place at a time and see whether the fast tests notice."
    )
    parser.add_argument("--sample", type=int, default=60, metavar="N", help="mutants at most (default: 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample (default: 0)")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="M", help="start no mutant after so many minutes (default: 20)")
    parser.add_argument("--paths", nargs="+", default=[], metavar="PATH", help="only modules at or below these paths (default: all)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="test runs at a time (default: one for each CPU)"
    )
    parser.add_argument("--notes", type=Path, default=NOTES, metavar="FILE", help=f"where to write (default: {NOTES})")
    parser.add_argument("--verbose", action="store_true", help="print the times of the runs without a mutant")
    return parser


if __name__ == "__main__":
    sys.exit(main())
