"""Both demo readers' graphs through a current TensorRT compiler, strongly typed, with dynamic profiles: no node may be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.checkpoint.files import load_checkpoint
from export.graphs.gpu import export_gpu_reader
from export.tensorrt.compiler import graphs_of


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["fid", "fido"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_every_graph_compiles(reader: str, precision: str, tmp_path: Path) -> None:
    # bf16 needs a TensorRT that reads newer opsets too, so those graphs are exported as the exporter writes them
    opset = 17 if precision == "float16" else 18
    manifest = export_gpu_reader(load_checkpoint(f"checkpoints/{reader}"), tmp_path / reader, precision, opset)
    command = [sys.executable, "-m", "tests.export.tensorrt.build_with_rtx", str(tmp_path / reader)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    sizes = json.loads(built.stdout.splitlines()[-1])
    assert list(sizes) == list(graphs_of(manifest))
    assert min(sizes.values()) > 10_000
