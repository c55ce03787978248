"""What `make` passes to Python, recorded by a stand-in for the interpreter: values as typed, and only the readers that were named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDER = '#!/bin/sh\nexec /usr/bin/env -u PYTHONPATH "$REAL_PYTHON" -c \'\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n\' "$@"\n'
AWKWARD = ["how much is $100?", 'who said "I can\'t"?', "`rm -rf x`; $(false) & $HOME \\ #1", "a  b\tc*"]


class Make:
    """Runs make on a copy of the Makefile; a call returns the arguments of every Python process that make starts."""

    def __init__(self, directory: Path):
        self.directory = directory
        shutil.copyfile(ROOT / "Makefile", directory / "Makefile")
        for file in ("", "-triton", "-export", "-evaluate", "-openvino", "-offline", "-dev"):
            (directory / f"requirements{file}.txt").write_text("")
        for folder in ("export", "serving/contract", "serving/launcher/preload", "venv/bin", "build/corpus"):
            (directory / folder).mkdir(parents=True)
        for name in ("heap_trim", "stream_locks"):
            (directory / f"serving/launcher/preload/{name}.c").write_text("")
        python = directory / "venv/bin/python"
        python.write_text(RECORDER)
        python.chmod(0o755)
        for made in ("venv/.serve", "venv/.export", "venv/.evaluate", "venv/.openvino", "venv/.dev", "build/corpus/heldout.jsonl"):
            (directory / made).write_text("")

    def __call__(self, *arguments: str, **variables: str) -> list[list[str]]:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}  # this test may itself run under make
        command = ["make", "--no-print-directory", *arguments, "VENV=venv"]
        env = {**inherited, "REAL_PYTHON": sys.executable, **variables}
        done = subprocess.run(command, cwd=self.directory, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


def exported(calls: list[list[str]]) -> list[str]:
    """NAME=CHECKPOINT of the one export among the calls."""
    (call,) = [call for call in calls if call[:3] == ["-m", "export", "readers"]]
    return [argument for argument in call[3:] if "=" in argument and call[call.index(argument) - 1] != "--flags"]


def test_one_process_exports_both_demo_readers(make):
    calls = make("export")
    assert len(calls) == 1 and calls[0][3] == "--default" and exported(calls) == ["fid=checkpoints/fid", "fido=checkpoints/fido"]
    assert calls[0][-6:] == ["--engine", "auto", "--graphs", "gemms", "--triton-backend", "python"]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"FID": "mine"}, ["fid=mine"]),
        ({"FIDO": "my checkpoints/fido (new)"}, ["fido=my checkpoints/fido (new)"]),
        ({"FID": "a", "FIDO": "b"}, ["fid=a", "fido=b"]),
        ({"READER": "nq", "CHECKPOINT": "a=b/c's"}, ["nq=a=b/c's"]),
        ({"READER": "nq", "CHECKPOINT": "x", "FID": "$HOME/`y`"}, ["fid=$HOME/`y`", "nq=x"]),
    ],
)
@pytest.mark.parametrize("by_environment", [False, True])
def test_only_the_readers_that_were_named_are_exported(make, variables, wanted, by_environment):
    if by_environment:
        assert exported(make("export", **variables)) == wanted
    else:
        assert exported(make("export", *(f"{name}={value}" for name, value in variables.items()))) == wanted


def test_flags_go_to_the_readers_that_are_exported(make):
    (call,) = make("export", "FID=x", "FID_FLAGS=--tokenizer a b", "FIDO_FLAGS=--append-eos")
    assert [call[i + 1] for i, word in enumerate(call) if word == "--flags"] == ["fid=--tokenizer a b"]
    (call,) = make("export", "READER=nq", "CHECKPOINT=x", "READER_FLAGS=--passage-length 250", "LIMITS=--slots 8 --max-passages 100")
    assert [call[i + 1] for i, word in enumerate(call) if word == "--flags"] == ["nq=--passage-length 250"]
    assert call[-4:] == ["--slots", "8", "--max-passages", "100"]


@pytest.mark.parametrize("question", AWKWARD)
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_question_is_asked_as_typed(make, question, by_environment):
    calls = make("ask", QUESTION=question) if by_environment else make("ask", f"QUESTION={question}", "PASSAGES=my file.json")
    (call,) = calls
    assert call[call.index("--question") + 1] == question
    assert call[call.index("--passages") + 1] == ("examples/passages.json" if by_environment else "my file.json")


def test_serve_serves_what_was_exported_and_exports_only_what_is_named(make):
    assert make("serve", "STREAM=1") == [["-m", "serving", "--readers", "--stream"]]
    assert make("serve", "GPUS=0,1") == [["-m", "serving", "--readers", "--gpus", "0,1"]]
    assert make("serve", "REPLICAS=2") == [["-m", "serving", "--readers", "--replicas", "2"]]
    assert make("serve", "READERS=nq,tqa") == [["-m", "serving", "--readers", "nq,tqa"]]
    assert exported(make("serve", "FID=mine")) == ["fid=mine"]
    export, serve = make("serve", "DEMO=1")
    assert exported([export]) == ["fid=checkpoints/fid", "fido=checkpoints/fido"]
    assert serve == ["-m", "serving", "--readers", "--repository", "build/demo/model_repository"]


@pytest.mark.parametrize("target", ["demo", "evaluate", "bench", "bench-load", "perf", "stress", "test", "gpu-test"])
def test_the_demo_tests_and_benchmarks_never_touch_what_a_user_exported(make, target):
    calls = [call for call in make(target) if call[:3] == ["-m", "export", "readers"]]
    assert calls, target
    for call in calls:
        assert call[call.index("--engines") + 1] == "build/demo/engines"
        assert call[call.index("--repository") + 1] == "build/demo/model_repository"


def test_comparisons_and_tests_export_both_readers(make):
    for target in ("demo", "evaluate", "test"):
        assert exported(make(target, "FID=my fid")) == ["fid=my fid", "fido=checkpoints/fido"]
    assert "onnxruntime" in make("test")[0]


def test_a_precision_is_passed_on_where_one_is_named(make):
    assert "--precision" not in make("export")[0]
    for calls in (make("export", "PRECISION=bf16"), make("export", PRECISION="bf16")):
        assert calls[0][calls[0].index("--precision") + 1] == "bf16"


def test_a_run_folder_may_have_a_space(make):
    calls = make("perf", "RUN=my run")
    assert len(calls) > 5 and all("my run" in call or "my run/peers.json" in call for call in calls[1:])


def test_every_target_of_the_readme_is_in_the_help(make):
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"setup", "export", "serve", "ask", "demo", "evaluate", "perf", "gpu-bench", "test", "stress", "lint", "clean"} <= listed
