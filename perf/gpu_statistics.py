"""How repeated GPU times are summed up and written down, for benchmarks that run under different Pythons."""

from __future__ import annotations

import json
import statistics
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
