"""Triton's own counts of one model, from a running server. What the readers count themselves is among the metrics (serving/triton)."""

from __future__ import annotations

import dataclasses
import json
from typing import Protocol

from .endpoints import fetch

TIMEOUT_S = 10.0
IN_FLIGHT_GAUGE = "reader_in_flight_questions"


class HttpServer(Protocol):
    """A server that answers Triton's HTTP protocol."""

    @property
    def http_url(self) -> str:
        """Base URL."""


@dataclasses.dataclass(frozen=True)
class ModelStatistics:
    """Counts since the server started.

    Attributes:
        requests: that succeeded.
        failed: requests that did not.
        executions: of batches.
        queue_s: sum over `requests` of the time in Triton's queue.
        compute_s: sum over `requests` of the time in the model's execute call. A reader answers after that call: see its own metrics.
    """

    requests: int
    failed: int
    executions: int
    queue_s: float
    compute_s: float


def statistics_of(server: HttpServer, model: str) -> ModelStatistics:
    """Ask a server for the counts of one model.

    Raises:
        OSError: if it does not answer, or does not know the model.
    """
    (stats,) = json.loads(fetch(f"{server.http_url}/v2/models/{model}/stats", TIMEOUT_S))["model_stats"]
    inference = stats["inference_stats"]
    return ModelStatistics(
        requests=int(inference["success"]["count"]),
        failed=int(inference["fail"]["count"]),
        executions=int(stats["execution_count"]),
        queue_s=int(inference["queue"]["ns"]) / 1e9,
        compute_s=int(inference["compute_infer"]["ns"]) / 1e9,
    )


def questions_in_flight(metrics_url: str) -> int:
    """Questions that the readers of a server have accepted and not yet answered; up to 0.25 s old (serving/triton/metrics.py).

    Raises:
        OSError: if the server does not answer.
    """
    lines = fetch(metrics_url, TIMEOUT_S).decode("utf-8", errors="replace").splitlines()
    return round(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{IN_FLIGHT_GAUGE}{{")))


def model_statistics(server: HttpServer, model: str) -> dict[str, float]:
    """The same as a dict, with mean queue and compute time per request in ms."""
    stats = statistics_of(server, model)
    return {
        "requests": stats.requests,
        "failed": stats.failed,
        "executions": stats.executions,
        "queue_ms": stats.queue_s * 1e3 / max(stats.requests, 1),
        "compute_ms": stats.compute_s * 1e3 / max(stats.requests, 1),
    }
