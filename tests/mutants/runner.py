"""Runs tests against mutants in copies of the tree: a mutated source and its test paths -> passed, failed or timed out; and a run's notes.

Each run is a fork of this process, in which the heavy packages (torch, ONNX) are imported already; the project's own modules are not, so
that every run imports the mutant. The tree that the command runs in is never written to.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Imported once, before the forks. None of them starts threads when imported; gRPC does, so it is left out.
PRELOADED = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors.torch",
    "tokenizers",
    "torch",
    "hypothesis",
    "pytest",
    "transformers",
)
# Tests that start many processes or compile CUDA sources are left out: they take most of the time and decide about no mutant of the scope.
LEFT_OUT_TESTS = "not signal and not b13_compare and not every_source_compiles"
PYTEST = ("-x", "-q", "-m", "not server and not slow and not gpu", "-k", LEFT_OUT_TESTS, "-p", "no:cacheprovider", "--hypothesis-seed=0")
POLL_S = 0.02
LEFT_OUT = ("perf/results/",)  # large, and read by no test that is run


def preload() -> None:
    """Import what takes seconds and is not under test."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def copy_tree(root: Path, copy: Path) -> None:
    """Copy the files that git knows of, with their uncommitted changes, and new files that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.split("\0"):
        if name and (root / name).is_file() and not name.startswith(LEFT_OUT):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)


class TestRun:
    """One pytest process, in a session of its own so that its children end with it.

    Args:
        copy: The copied tree that the tests run in.
        tests: Test paths in it.
        log: A file for the output.
        timeout_s: After which the run is ended.
    """

    __test__ = False  # not a test class

    def __init__(self, copy: Path, tests: tuple[str, ...], log: Path, timeout_s: float):
        self._started_s, self._timeout_s = time.monotonic(), timeout_s
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run_pytest(copy, tests, log)

    def outcome(self) -> str | None:
        """`passed`, `failed`, `timed out`, or None while the tests run."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self._end_children()
            return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        if self.elapsed_s() > self._timeout_s:
            self.close()
            return "timed out"
        return None

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def close(self) -> None:
        """End the tests."""
        self._end_children()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _end_children(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def wait(self) -> str:
        """Block until there is an outcome."""
        while (outcome := self.outcome()) is None:
            time.sleep(POLL_S)
        return outcome


def _run_pytest(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    """In the forked process: run pytest and leave without this process's exit handlers."""
    code = 1
    try:
        os.setsid()
        with log.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(copy)
        sys.dont_write_bytecode = True  # a mutant may have the size and the second of its predecessor
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for name in [name for name in sys.modules if name.split(".")[0] in ("serving", "export", "clients", "perf", "training", "tests")]:
            del sys.modules[name]
        # `python -m` put the original tree first, or, as "", the working directory
        sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(copy)) and not (Path(path) / "serving").is_dir())]
        import hypothesis
        import pytest

        hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
        hypothesis.settings.load_profile("mutants")  # that a mutant fails is enough: no smaller example is looked for
        code = int(pytest.main([*PYTEST, *tests]))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
