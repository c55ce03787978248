"""Readers of a model repository: chosen by name, and described when they are served."""

from __future__ import annotations

import pytest

from export.repository import repository_from_engines
from serving.contract.limits import Limits
from serving.launcher.installation import ServerError
from serving.launcher.repository import chosen_readers, has_python_process, reader_table, served_reader
from tests.serving.launcher.stand_in import write_models


@pytest.fixture
def named(tmp_path):
    path = write_models(tmp_path, nq_encoder="tensorrt", nq="python", trivia_encoder="python", trivia="python", trivia_stream="python")
    write_models(path, unexported="python", unexported_encoder="python")
    for reader in ("nq", "trivia"):
        (path / reader / "1").mkdir(exist_ok=True)
        (path / reader / "1" / "manifest.json").write_text("{}")
    return path


@pytest.mark.parametrize("words", [["nq,trivia"], ["nq", "trivia"], ["nq,", "trivia"], ["nq", ",trivia", "nq"], ["nq, trivia"], [], [","]])
def test_readers_are_separated_by_blanks_or_commas_and_none_means_all_exported_ones(named, words):
    assert chosen_readers(words, named) == ["nq", "trivia"]


@pytest.mark.parametrize(("words", "got"), [(["nq", "trvia"], "trvia"), (["nq_encoder"], "nq_encoder"), (["unexported"], "unexported")])
def test_an_unknown_reader_is_answered_with_the_known_ones(named, words, got):
    with pytest.raises(ServerError, match=rf"^--readers: wanted any of nq, trivia \(in .*\), got {got}$"):
        chosen_readers(words, named)


def test_an_empty_repository_says_what_makes_readers(tmp_path):
    with pytest.raises(ServerError, match=r"wanted exported readers, got none; `make export READER=name CHECKPOINT=path`"):
        chosen_readers(["fid"], tmp_path)


def test_only_the_python_backend_has_processes(named):
    assert not has_python_process(named, "nq_encoder") and has_python_process(named, "nq")
    (named / "nq" / "config.pbtxt").write_text('name: "nq"\nplatform: "tensorrt_plan"\n')
    assert not has_python_process(named, "nq")
    (named / "nq" / "config.pbtxt").write_text('name: "nq" {')
    with pytest.raises(ServerError, match=r"nq/config.pbtxt: cannot be read"):
        has_python_process(named, "nq")


def test_what_is_served_is_said_of_each_reader(engines, tmp_path):
    checkpoint, directory = engines["fido"]
    repository_from_engines(directory, tmp_path, "fido", Limits(slots=3, max_passages=7))
    heading, line = reader_table([served_reader(tmp_path, "fido")])
    assert heading.split() == ["reader", "kind", "checkpoint", "parameters", "engine", "precision", "slots", "max", "passages"]
    millions = sum(weight.numel() for weight in checkpoint.reader.parameters()) / 1e6
    assert line.split() == ["fido", "fido", "fido", f"{millions:,.1f}", "M", "onnxruntime", "float32", "3", "7"]
