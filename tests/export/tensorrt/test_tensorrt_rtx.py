"""Both demo readers' graphs through a current TensorRT compiler, strongly typed, with dynamic profiles: no node may be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.checkpoint.files import Checkpoint, load_checkpoint
from export.graphs.gpu import export_gpu_reader
from export.manifest_writer import write_manifest
from export.tensorrt.compiler import graphs_of
from serving.contract.manifest import Manifest, sha256_of_file
from tests.conftest import FIDO, random_reader, wide


def build(graphs: Path, engines: Path, jobs: int = 1) -> subprocess.CompletedProcess[str]:
    """Build in a process of its own: Polygraphy chooses its TensorRT when it is first imported."""
    command = [sys.executable, "-m", "tests.export.tensorrt.build_with_rtx", graphs, engines, engines.with_name("timings"), str(jobs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["fid", "fido"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_every_graph_compiles(reader: str, precision: str, tmp_path: Path) -> None:
    # bf16 needs a TensorRT that reads newer opsets too, so those graphs are exported as the exporter writes them
    opset = 17 if precision == "float16" else 18
    manifest = export_gpu_reader(load_checkpoint(f"checkpoints/{reader}"), tmp_path / reader, precision, opset)
    built = build(tmp_path / reader, tmp_path / "engines")
    assert built.returncode == 0, built.stderr[-3000:]
    sizes = json.loads(built.stdout.splitlines()[-1])
    assert list(sizes) == list(graphs_of(manifest))
    assert min(sizes.values()) > 10_000


def test_a_reader_is_built_by_two_processes_and_a_graph_that_is_refused_leaves_nothing(tmp_path: Path, tokenizer_json: str) -> None:
    graphs, engines = tmp_path / "graphs", tmp_path / "engines"
    export_gpu_reader(Checkpoint(random_reader(wide(FIDO)), tokenizer_json, "test", "own"), graphs)
    built = build(graphs, engines, jobs=2)
    assert built.returncode == 0, built.stderr[-3000:]
    manifest = Manifest.load(engines)
    manifest.verify(engines, tuple(manifest.files))
    assert {f"{name}.plan" for name in graphs_of(manifest)} <= set(manifest.files)
    assert not list(engines.glob("*.onnx")) and len(list(engines.glob("*.npy"))) == len(list(graphs.glob("*.npy")))
    assert (tmp_path / "timings").stat().st_size > 0  # for the next reader

    (graphs / "decoder.wo.onnx").write_bytes(b"no graph")
    refused = Manifest.load(graphs)
    refused.files["decoder.wo.onnx"] = sha256_of_file(graphs / "decoder.wo.onnx")
    write_manifest(refused, graphs)
    before = sorted(path.name for path in tmp_path.iterdir())
    failed = build(graphs, engines)
    assert failed.returncode == 1 and "error: decoder.wo.onnx: TensorRT 1." in failed.stderr and "cannot build it" in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Manifest.load(engines) == manifest
