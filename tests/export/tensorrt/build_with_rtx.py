"""Builds the engines of a GPU reader with TensorRT-RTX, which needs no GPU for it; prints a line of JSON: engine -> bytes.

Arguments: the graphs' directory, the engines' directory, the file of kernel timings, and the number of processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"

from export.tensorrt import compiler
from export.tensorrt.detect import BuildTarget, Gpu
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError

if __name__ == "__main__":  # the processes that build import this module
    graphs, directory, timings = map(Path, sys.argv[1:4])
    compiler.build_target = lambda: BuildTarget(Gpu("none", "9.0", "13.0"), "1.0")
    try:
        manifest = compiler.build_engines(graphs, directory, Limits(slots=8, encoder_batch=120), timings, int(sys.argv[4]))
    except EngineError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({name: (directory / f"{name}.plan").stat().st_size for name in compiler.graphs_of(manifest)}))
