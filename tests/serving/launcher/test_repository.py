"""Readers of a model repository: chosen by name, and described when they are served."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from export.manifest_writer import write_manifest
from export.repository import repository_from_engines
from serving.__main__ import announce
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
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
    assert served_reader(tmp_path, "fido").why == "", "the user named the engine"


def test_why_an_engine_serves_is_said_where_export_chose_it(engines, tmp_path, capsys):
    directory = tmp_path / "engines"
    shutil.copytree(engines["fid"][1], directory)
    chosen = {"cpu": "A CPU", "question_ms": {"onnxruntime": 1053.24, "openvino": 35.06}}
    manifest = Manifest.load(directory)
    write_manifest(dataclasses.replace(manifest, engine="openvino", provenance=manifest.provenance | {"chosen_engine": chosen}), directory)
    repository_from_engines(directory, tmp_path / "repository", "fid", Limits())
    url = "127.0.0.1:1"
    server: Any = SimpleNamespace(
        repository=tmp_path / "repository", models=["fid"], log="", request_log="", missing_guards=[], triton=None
    )
    announce(SimpleNamespace(**vars(server), grpc_url=url, http_url=url, metrics_url=url), ["fid"])
    lines = capsys.readouterr().out.splitlines()
    assert "engine     fid: openvino; a question at export: openvino 35.1 ms, onnxruntime 1,053.2 ms on A CPU" in lines
    assert lines[-1].startswith("ready")
