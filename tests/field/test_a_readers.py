"""A user's own readers: any number, under names of the user's choice; what was exported is what is served."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from export.checkpoint.files import save_reader
from fido_client.reader_client import ReaderClient
from perf.served.sweep import size_fault
from serving.contract.manifest import Manifest
from serving.launcher.endpoints import free_ports
from tests.conftest import FID, FIDO, random_reader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    """Three readers of a user: two FiD that differ, and a FiDO; one path has a space."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer_json)
    for name, config, seed in (("nq", FID, 1), ("my trivia", FID, 2), ("sparse", FIDO, 3)):
        save_reader(folder / name, random_reader(config, seed), tokenizer, torch.float32)
    return folder


def export(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make export` runs, with the engines and the model repository in a folder of the test."""
    command = [sys.executable, "-m", "export", "readers", *arguments, "--engine", "onnxruntime"]
    command += ["--engines", str(place / "engines"), "--repository", str(place / "model_repository")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@contextlib.contextmanager
def serving(place: Path) -> Iterator[tuple[list[str], str]]:
    """`python -m serving` on that repository: the lines up to "ready", and the gRPC endpoint."""
    ports = free_ports(3)
    command = [sys.executable, "-m", "serving", "--repository", str(place / "model_repository"), "--log", str(place / "log" / "triton.log")]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines: list[str] = []
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if line.startswith("ready"):
                    break
            assert lines and lines[-1].startswith("ready"), "\n".join(lines)
            yield lines, f"127.0.0.1:{ports[1]}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def exported(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mine")
    done = export(place, f"nq={checkpoints / 'nq'}", f"tqa={checkpoints / 'my trivia'}", f"sparse={checkpoints / 'sparse'}")
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.server
def test_a1_what_was_exported_is_what_is_served(exported):
    with serving(exported) as (lines, url):
        table = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in ("nq", "tqa", "sparse")}
        assert set(table) == {"nq", "tqa", "sparse"}
        assert " fid " in table["nq"] and " fido " in table["sparse"] and "onnxruntime" in table["nq"] and "my trivia" in table["tqa"]
        answers = {}
        for reader in table:
            with ReaderClient(url, model=reader) as client:
                answers[reader] = client.answer("w1 w2", ["w3 w4", "w5"], max_new_tokens=8, min_new_tokens=8)
        assert answers["nq"].log_prob != answers["tqa"].log_prob, "two readers of one kind, each with its own weights"


def test_a1_without_a_name_what_was_exported_before_is_brought_up_to_date(exported, tmp_path, checkpoints):
    done = export(exported, "--default", "fid=checkpoints/fid")
    assert done.returncode == 0 and done.stdout.splitlines() == ["nq: up to date", "sparse: up to date", "tqa: up to date"]
    first = export(tmp_path, "--default", f"one={checkpoints / 'nq'}")
    assert first.returncode == 0 and first.stdout.startswith("one: ")
    assert export(tmp_path).stdout == "one: up to date\n"


def test_a2_exporting_one_reader_leaves_the_others_as_they_were(exported, checkpoints):
    before = {path: path.stat().st_mtime_ns for path in (exported / "model_repository").rglob("*") if path.is_file()}
    done = export(exported, f"nq={checkpoints / 'sparse'}")
    assert done.returncode == 0, done.stderr
    paths = [path for path, time in before.items() if not path.exists() or path.stat().st_mtime_ns != time]
    changed = {path.relative_to(exported / "model_repository").parts[0] for path in paths}
    assert changed and changed <= {"nq", "nq_encoder", "nq_stream"}
    assert json.loads((exported / "model_repository/nq/1/manifest.json").read_text())["reader"] == "fido"
    assert export(exported, f"nq={checkpoints / 'nq'}").returncode == 0


def test_a2_readers_of_different_sizes_are_compared_only_if_asked(exported, tmp_path):
    for name, source in (("fid", "nq"), ("fido", "sparse")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text((exported / "engines" / source / "manifest.json").read_text())
    assert size_fault(tmp_path) == ""
    manifest = Manifest.load(tmp_path / "fido")
    wider = dataclasses.replace(manifest, sizes=dataclasses.replace(manifest.sizes, d_model_encoder=999))
    (tmp_path / "fido" / "manifest.json").write_text(wider.to_json())
    assert "encoder width 999" in size_fault(tmp_path) and "--different-sizes" in size_fault(tmp_path)


@pytest.mark.parametrize("name", ["a_encoder", "b_stream", "../x", "a b", ""])
def test_a3_a_name_that_cannot_be_served_is_refused_in_one_line(name, tmp_path, checkpoints):
    done = export(tmp_path, f"{name}={checkpoints / 'nq'}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "model_repository").exists()


def test_a4_a_checkpoint_at_a_path_with_a_space_is_exported_as_typed(exported):
    # tests/test_makefile.py types quotes, dollars, backticks and spaces on make's command line
    assert Manifest.load(exported / "engines" / "tqa").provenance["source"] == "my trivia"


def test_a6_readers_by_commas_and_unknown_ones_are_answered_with_the_known_ones(exported):
    port = str(free_ports(1)[0])
    command = [sys.executable, "-m", "serving", "--repository", str(exported / "model_repository"), "--status", "--http-port", port]
    done = subprocess.run([*command, "--readers", "nq,tqa"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["reader", "nq", "tqa"] and all(line.endswith("not served") for line in lines[1:])
    done = subprocess.run([*command, "--readers", "nqq"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "wanted any of nq, sparse, tqa" in done.stderr and "got nqq" in done.stderr
