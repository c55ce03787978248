"""Summaries of repeated measurements, and their JSON output. Uses only the standard library, for benchmarks in other environments."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def spread(samples: list[float], digits: int = 3) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": round(statistics.median(samples), digits), "min": round(min(samples), digits), "max": round(max(samples), digits)}


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as JSON, and write it to `out` if given."""
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def free_gpu_memory() -> None:
    """Free CuPy's memory pool, if CuPy was used: the next reader plans by the GPU's free memory."""
    gc.collect()
    if cupy := sys.modules.get("cupy"):
        cupy.get_default_memory_pool().free_all_blocks()
