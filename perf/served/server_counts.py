"""The server's counts during a load point: differences of Triton's statistics and of the readers' metrics."""

from __future__ import annotations

from typing import Any

from serving.launcher.endpoints import fetch
from serving.launcher.server import TritonServer
from serving.launcher.statistics import statistics_of

TIMEOUT_S = 10.0
# The readers' counters (serving/triton/metrics.py) that a load point reports.
COUNTERS = (
    "encoder_engine_seconds_total",
    "encoder_passages_total",
    "encoder_tokens_total",
    "reader_generated_tokens_total",
    "reader_steps_total",
    "reader_step_seconds_total",
)
GPU_GAUGES = ("nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_power_usage")
Counts = dict[str, float]


def counts_of(server: TritonServer) -> Counts:
    """All counts now, by model and name."""
    found: Counts = {}
    for model in server.models:
        stats = statistics_of(server, model)
        found[f"{model} executions"] = float(stats.executions)
        found[f"{model} requests"] = float(stats.requests)
        found[f"{model} queue_s"] = stats.queue_s
        found[f"{model} compute_infer_s"] = stats.compute_s
    lines = fetch(server.metrics_url, TIMEOUT_S).decode().splitlines()
    for line in lines:
        name, _, rest = line.partition("{")
        if name in COUNTERS:
            labels, _, value = rest.rpartition("} ")
            found[f"{labels.partition('model=')[2].split(',')[0].strip(chr(34))} {name}"] = float(value)
        elif name in GPU_GAUGES:
            found[name] = float(rest.rpartition(" ")[2])
    return found


def difference(earlier: Counts, later: Counts, reader: str) -> dict[str, Any]:
    """Counts of one reader's models between two readings; GPU gauges as of the later one."""
    models = (reader, f"{reader}_encoder", f"{reader}_stream")
    found = {
        name: round(value - earlier.get(name, 0.0), 6)
        for name, value in later.items()
        if name.partition(" ")[0] in models and value != earlier.get(name, 0.0)
    }
    return found | {name: later[name] for name in GPU_GAUGES if name in later}
