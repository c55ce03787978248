"""`python -m tests.mutants`: change the code in one place at a time and see whether the fast tests notice.

In: a seed, a sample size, a time limit, and optionally paths. Out: every survivor, docs/notes/mutants.md, and as the last line
`mutants: N tried, K killed, P%`. A mutant whose tests run out of time counts as killed. Exit codes: 0 the run is complete, 1 the tests fail
without a mutant, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.mutants import runner, sites
from tests.mutants.runner import Tried

ROOT = Path(__file__).parents[2]
NOTES = Path("docs/notes/mutants.md")
TIMEOUT_FACTOR, TIMEOUT_EXTRA_S = 4.0, 20.0  # of the unmutated tests' time
BASELINE_TIMEOUT_S, SLOW_BASELINE_S = 900.0, 20.0
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


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    paths = sites.modules(ROOT, tuple(args.paths))
    if not paths:
        print(f"--paths: wanted paths at or below {', '.join(sites.TESTS_OF_MODULES)}, got {' '.join(args.paths)}", file=sys.stderr)
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
        timeouts_s = _baselines(copies[0], {sites.tests_of(ROOT, mutant.path) for mutant in chosen}, args.verbose)
        if timeouts_s is None:
            return 1
        tried = list(_try_all(chosen, copies, timeouts_s, started_s + args.minutes * 60))
    accepted = runner.load_reasons()
    print(runner.survivors_text(tried, accepted))
    out = args.notes or (Path("build/mutants.md") if args.paths else NOTES)
    settings = f"--seed {args.seed} --sample {args.sample} --minutes {args.minutes:g}"
    settings += f" --paths {' '.join(args.paths)}" if args.paths else ""
    runner.write_notes(ROOT / out, tried, accepted, settings)
    print(f"written: {out}")
    print(runner.score_line(tried))
    return 0


def sample(paths: list[str], count: int, seed: int) -> list[Mutant]:
    """At most `count` mutants, one at a site, drawn without replacement from the sites of all modules; the same ones for the same seed."""
    numbers = random.Random(seed)
    originals = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    everywhere = [(path, site) for path, original in originals.items() for site in sites.mutation_sites(original)]
    numbers.shuffle(everywhere)
    chosen: list[Mutant] = []
    for path, site in everywhere:
        if len(chosen) == count:
            break
        source = sites.mutated(originals[path], numbers.choice(site.variants))
        if source is not None:
            chosen.append(Mutant(path, site.line, originals[path], source))
    return chosen


def _baselines(copy: Path, groups: set[tuple[str, ...]], verbose: bool) -> dict[tuple[str, ...], float] | None:
    """Time-outs in seconds for each group of tests, from a run without a mutant; None if that run fails."""
    timeouts_s = {}
    for index, tests in enumerate(sorted(groups)):
        log = copy.parent / f"baseline{index}.log"
        run = runner.TestRun(copy, tests, log, BASELINE_TIMEOUT_S)
        outcome = run.wait()
        if outcome != "passed":
            print(log.read_text(errors="replace"), file=sys.stderr)
            print(f"error: the tests {outcome} without a mutant: {' '.join(tests)}", file=sys.stderr)
            return None
        if run.elapsed_s() > SLOW_BASELINE_S:  # the first run may have exported the engines, which the mutants' runs will not
            run = runner.TestRun(copy, tests, log, BASELINE_TIMEOUT_S)
            run.wait()
        timeouts_s[tests] = TIMEOUT_FACTOR * run.elapsed_s() + TIMEOUT_EXTRA_S
        if verbose:
            print(f"{run.elapsed_s():.1f} s without a mutant: {' '.join(tests)}", flush=True)
    return timeouts_s


def _try_all(mutants: list[Mutant], copies: list[Path], timeouts_s: dict[tuple[str, ...], float], deadline_s: float) -> Iterator[Tried]:
    """Try the mutants in their order, one in each copy at a time; none is started after the deadline."""
    waiting = collections.deque(mutants)
    running: dict[Path, tuple[Mutant, runner.TestRun]] = {}
    try:
        while running or (waiting and time.monotonic() < deadline_s):
            for copy in copies:
                if copy not in running and waiting and time.monotonic() < deadline_s:
                    mutant = waiting.popleft()
                    (copy / mutant.path).write_text(mutant.source, encoding="utf-8")
                    tests = sites.tests_of(ROOT, mutant.path)
                    running[copy] = mutant, runner.TestRun(copy, tests, copy.with_suffix(".log"), timeouts_s[tests])
            for copy, (mutant, run) in list(running.items()):
                outcome = run.outcome()
                if outcome is not None:
                    del running[copy]
                    (copy / mutant.path).write_text(mutant.original, encoding="utf-8")
                    tried = runner.tried(mutant.path, mutant.line, mutant.original, mutant.source, outcome)
                    print(f"{outcome:9} {run.elapsed_s():5.1f} s  {tried}", flush=True)
                    yield tried
            time.sleep(runner.POLL_S)
    finally:
        for _, run in running.values():
            run.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Change the code in one place at a time and see whether the fast tests notice."
    )
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="mutants at most (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sample (default: 0)")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="start no mutant after so many minutes (default: 10)")
    parser.add_argument("--paths", nargs="+", default=[], metavar="PATH", help="only modules at or below these paths (default: all)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="test runs at a time (default: one for each CPU)"
    )
    parser.add_argument("--notes", type=Path, metavar="FILE", help=f"where to write (default: {NOTES}, with --paths build/mutants.md)")
    parser.add_argument("--verbose", action="store_true", help="print the times of the runs without a mutant")
    return parser


if __name__ == "__main__":
    sys.exit(main())
