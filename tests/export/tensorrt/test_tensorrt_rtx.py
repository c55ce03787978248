"""Both demo readers' graphs through a current TensorRT compiler, strongly typed, with dynamic profiles: no node may be refused.

TensorRT-RTX stands in for TensorRT 10 and 11 (build_with_rtx.py): the calls are those that a user's TensorRT gets, and whatever 11 removed
is an error. What the builder was given is compared with the manifest's tensors and with the limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.checkpoint.files import load_checkpoint
from export.graphs.gpu import export_gpu_reader
from export.tensorrt.compiler import graphs_of, tasks_of
from serving.contract.limits import Limits

# The types of TensorRT and of the contract.
TYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "int32": "int32"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "form", "precision", "version"),
    [
        ("fid", "gemms", "float16", "11.4.0.106"),
        ("fido", "gemms", "float16", "10.14.1.48"),
        ("fid", "gemms", "bfloat16", "10.14.1.48"),
        ("fido", "gemms", "bfloat16", "11.4.0.106"),
        ("fido", "whole encoder", "float16", "11.4.0.106"),
        ("fido", "whole", "float16", "11.4.0.106"),
        ("fid", "whole", "bfloat16", "10.14.1.48"),
        ("fid", "gemms", "float16", None),
    ],
)
def test_every_graph_compiles_as_the_manifest_says(reader: str, form: str, precision: str, version: str | None, tmp_path: Path) -> None:
    # bf16 needs a TensorRT that reads newer opsets too, so those graphs are exported as the exporter writes them
    opset = 17 if precision == "float16" else 18
    checkpoint = load_checkpoint(f"checkpoints/{reader}")
    manifest = export_gpu_reader(
        checkpoint, tmp_path / reader, precision, opset, whole_encoder=form == "whole encoder", whole=form == "whole"
    )
    command = [sys.executable, "-m", "tests.export.tensorrt.build_with_rtx", str(tmp_path / reader), *([version] if version else [])]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    report = json.loads(built.stdout.splitlines()[-1])
    assert len(report["flags"]) == 1 and len(report["engines"]) >= 3
    profiles = {task.name: task.profiles for task in tasks_of(manifest, Limits(slots=8, encoder_batch=120))}
    for name, tensors in graphs_of(manifest).items():
        engine = report["engines"].pop(name)
        specs = (*tensors.inputs, *tensors.outputs)
        assert [(n, TYPES[dtype]) for n, dtype, _ in engine["tensors"]] == [(spec.name, spec.dtype) for spec in specs]
        for spec, (_, _, shape) in zip(specs, engine["tensors"], strict=True):
            assert [-1 if isinstance(axis, str) else axis for axis in spec.axes] == shape, spec
        wanted = [{tensor: [list(shape) for shape in shapes] for tensor, shapes in profile.items()} for profile in profiles[name]]
        assert engine["profiles"] == wanted
        assert engine["bytes"] > 10_000
    assert not report["engines"]
