"""Compiles all graphs of a GPU reader with TensorRT-RTX, which needs no GPU for it; prints a line of JSON: engine -> bytes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"

from export.tensorrt.compiler import Compiler, tasks_of
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest

graphs = Path(sys.argv[1])
manifest = Manifest.load(graphs)
compiler = Compiler(manifest.precision)
tasks = tasks_of(manifest, Limits(slots=8, encoder_batch=120))
print(json.dumps({task.name: len(compiler.compile(graphs / f"{task.name}.onnx", task.profiles)) for task in tasks}))
