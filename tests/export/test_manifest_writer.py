"""Engine directories: published whole, readable by others, and restored after a crash or a signal."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from export import __main__ as command_line
from export import manifest_writer
from export.checkpoint.files import save_reader
from export.checkpoint.hugging_face import NotT5Error
from export.manifest_writer import atomic_directory, write_atomically
from tests.conftest import FIDO, random_reader


@pytest.fixture
def umask_022() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_container_user_can_read_what_is_published(tmp_path: Path, umask_022: None):
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("x")
    assert mode(tmp_path / "engines") == 0o755 and mode(tmp_path / "engines" / "file") == 0o644
    write_atomically(tmp_path / "stamp", b"x")
    assert mode(tmp_path / "stamp") == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_former_content_is_there_and_nothing_else(error: type[BaseException], tmp_path: Path):
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("former")
    with pytest.raises(error), atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]
    assert (tmp_path / "engines" / "file").read_text() == "former"


def test_the_former_directory_is_deleted_only_after_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At every deletion of former content, `engines` must hold the new content."""
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("former")
    delete, seen = manifest_writer.shutil.rmtree, []

    def recorded(path: Path, ignore_errors: bool = False) -> None:
        if (Path(path) / "file").exists():
            seen.append(((Path(path) / "file").read_text(), (tmp_path / "engines" / "file").read_text()))
        delete(path, ignore_errors)

    monkeypatch.setattr(manifest_writer.shutil, "rmtree", recorded)
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("new")
    assert seen == [("former", "new")]
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_crash_between_the_two_renames_is_repaired_by_the_next_call(tmp_path: Path):
    old = tmp_path / ".engines.old"
    old.mkdir()
    (old / "file").write_text("former")
    with pytest.raises(ValueError), atomic_directory(tmp_path / "engines"):
        raise ValueError
    assert (tmp_path / "engines" / "file").read_text() == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


# Errors and signals: one line, an exit code, and nothing half-written.


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
