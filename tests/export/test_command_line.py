"""Errors and signals: one line, an exit code, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from export import __main__ as command_line
from export.checkpoint.files import save_reader
from export.checkpoint.hugging_face import NotT5Error
from tests.conftest import FIDO, random_reader


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "export", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_json: str) -> Path:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    save_reader(tmp_path / "checkpoint", random_reader(FIDO), tmp_path / "tokenizer.json", torch.float32)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "./nowhere", "{tmp}/out"], "./nowhere: wanted a directory"),  # CheckpointError
        (["preset", "huge", "{tmp}/out", "--tokenizer", "x"], "preset size: wanted one of small"),  # ConfigError
        (["build", "x", "{tmp}/out", "--slots", "0"], "slots: wanted an integer of at least 1, got 0"),  # LimitsError
        (["repository", "{tmp}/nowhere", "--reader", "fid"], "nowhere/manifest.json: missing"),  # ManifestError
        (["repository", "{tmp}", "--reader", "fid_stream"], "reader name: wanted letters"),  # UsageError
        (["repository", "/dev/null", "--reader", "fid"], "/dev/null/manifest.json: "),
        (["convert", "{tmp}/file", "{tmp}/out"], "file: wanted a directory"),
    ],
)
def test_errors_of_the_user_are_told_without_a_traceback(arguments: list[str], message: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_errors_of_the_operating_system_are_told_in_one_line(checkpoint: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = run("onnx", str(checkpoint), str(tmp_path / "file" / "engines"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Not a directory" in done.stderr or "File exists" in done.stderr


def test_a_subclass_is_told_too_and_an_error_of_ours_is_not_hidden(monkeypatch, capsys):
    def fail(error: Exception):
        def command(_: object) -> int:
            raise error

        monkeypatch.setitem(command_line.COMMANDS, "detect", command)
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            return command_line.main(["detect"])
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
                signal.signal(number, handler)

    class EngineError(Exception):
        """Another library's class of the same name."""

    assert fail(NotT5Error("no T5")) == 1
    assert capsys.readouterr().err == "error: no T5\n"
    for error in (ValueError("a bug"), EngineError("theirs")):
        with pytest.raises(type(error)):
            fail(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_exporting_is_cleaned_up(number: signal.Signals, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "export", "onnx", str(checkpoint), str(out / "engines")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob(".engines.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + number, "")
    assert stderr == f"error: onnx: stopped by {number.name}; unfinished files were removed\n"
    assert list(out.iterdir()) == []
