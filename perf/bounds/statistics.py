"""How repeated GPU times are summed up and written down, for benchmarks that run under different Pythons."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def spread(samples: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(samples), digits), "min": round(min(samples), digits), "max": round(max(samples), digits)}


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as JSON, and write it to `out` if given."""
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def give_memory_back() -> None:
    """What CuPy, if it was used, keeps of a GPU's memory for later: the next reader asks the card how much is free."""
    gc.collect()
    if cupy := sys.modules.get("cupy"):
        cupy.get_default_memory_pool().free_all_blocks()
