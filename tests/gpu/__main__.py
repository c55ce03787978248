"""`make gpu-test`: every GPU test, then the six models in Triton: held-out EM, streaming, cancellation. Writes gpu-test.json.

The answers through Triton are compared with those of the fp32 engines on this machine's CPU; a difference counts as explained where both
answers' log-probabilities at the first differing token lie closer together than NEAR_TIE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from export.repository import repository_from_engines
from fido_client.data.examples import Example, read_examples
from fido_client.evaluation import evaluate
from fido_client.reader_client import ReaderClient
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.launcher.server import TritonServer, models_of
from serving.pipeline.in_process import Generated, InProcessReader
from tests.gpu.conftest import CPU_ENGINES, ENGINES, HELDOUT, limits_of

READERS = ("fid", "fido")
NEAR_TIE = 0.05
CONCURRENCY = 16


class Counter:
    """Counts outcomes and keeps what tests recorded."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.errors: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for every phase of every test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.when == "call":
            self.errors |= dict(report.user_properties)


def texts(example: Example) -> tuple[list[str], list[str]]:
    """Passages and titles."""
    return [c.text for c in example.contexts], [c.title or "" for c in example.contexts]


def reference_answers(name: str, examples: Sequence[Example]) -> list[Generated]:
    """Of the fp32 engines on the CPU."""
    with InProcessReader(CPU_ENGINES / name) as reader, ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(lambda e: reader.answer(e.question, *texts(e)), examples))


@dataclasses.dataclass
class Difference:
    """An answer that is not the fp32 engines'."""

    question: str
    wanted: str
    got: str
    gap: float  # between the log-probabilities at the first place where the answers may part

    @property
    def near_tie(self) -> bool:
        """Whether half precision explains it."""
        return self.gap < NEAR_TIE


def differences(examples: Sequence[Example], wanted: Sequence[Generated], found: Sequence[Any]) -> list[Difference]:
    """Answers that differ in text; the gap is the smallest over the tokens up to where one of them ends.

    Where the answers part, both engines picked the likelier of two tokens; if that was a near tie, both picks have nearly the same
    log-probability. Before it the log-probabilities agree, so the last token of agreement and the parting one are what is looked at.
    """
    out = []
    for example, want, got in zip(examples, wanted, found, strict=True):
        if got is None or got.text != want.text:
            pairs = [] if got is None else list(zip(want.log_probs, got.token_log_probs, strict=False))
            parting = next((i for i, (a, b) in enumerate(pairs) if abs(a - b) > NEAR_TIE / 10), len(pairs) - 1)
            gap = abs(pairs[parting][0] - pairs[parting][1]) if pairs else float("inf")
            out.append(Difference(example.question, want.text, "" if got is None else got.text, round(gap, 4)))
    return out


def check_stream(server: TritonServer, name: str, examples: Sequence[Example]) -> int:
    """Streams whose chunks do not join to the unary answer."""
    wrong = 0
    with ReaderClient(server.grpc_url, name) as client:
        for example in examples:
            whole = client.answer(example.question, *texts(example)).text
            chunks = [chunk.text for chunk in client.stream(example.question, *texts(example))]
            wrong += "".join(chunks) != whole
    return wrong


def gauge(server: TritonServer, name: str, model: str) -> float:
    """One of the server's metrics."""
    with urllib.request.urlopen(server.metrics_url, timeout=5) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{") and f'"{model}"' in line)


def check_cancellation(server: TritonServer, name: str, example: Example) -> dict[str, float]:
    """Cancel long answers under way and see their slots come free."""
    with ReaderClient(server.grpc_url, name, timeout_s=0.05) as client:
        for _ in range(20):
            try:
                client.answer(example.question, *texts(example), max_new_tokens=512, min_new_tokens=512)
            except Exception:  # the deadline is the point
                continue
    started = time.monotonic()
    while (held := gauge(server, "reader_active_slots", name)) and time.monotonic() - started < 5:
        time.sleep(0.01)
    return {"slots_still_held": held, "free_after_s": round(time.monotonic() - started, 3)}


def serve_and_ask(limit: int | None) -> dict[str, Any]:
    """All six models in Triton on the GPU."""
    examples = list(read_examples(HELDOUT, limit=limit))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in READERS:
            repository_from_engines(ENGINES / name, Path(scratch), name, limits_of(ENGINES / name))
        with TritonServer(models_of(READERS, stream=True), Path(scratch), log=Path("build/gpu-test-tritonserver.log")) as server:
            for name in READERS:
                wanted = reference_answers(name, examples)
                answers: list[Any] = []
                with ReaderClient(server.grpc_url, name) as client:
                    alone = evaluate(client, examples[:100], concurrency=1, warmup=8)
                    together = evaluate(
                        client,
                        examples,
                        concurrency=CONCURRENCY,
                        warmup=8,
                        on_prediction=lambda p: answers.append(p.answer),  # noqa: B023
                    )
                unlike = differences(examples, wanted, answers)
                right = sum(any(w.text.lower() == a.lower() for a in e.answers) for e, w in zip(examples, wanted, strict=True))
                result[name] = {
                    "em": round(together.em or 0.0, 2),
                    "cpu_fp32_exact_text": round(100 * right / len(examples), 2),
                    "questions": len(examples),
                    "failed": together.failed,
                    "equal_to_fp32_percent": round(100 * (1 - len(unlike) / len(examples)), 3),
                    "differences": [dataclasses.asdict(d) | {"near_tie": d.near_tie} for d in unlike],
                    "questions_per_s_at_16": round(together.questions_per_s or 0.0, 1),
                    "alone_p50_ms": round((alone.latency_s(50) or 0) * 1e3, 2),
                    "streams_unlike_unary": check_stream(server, name, examples[:50]),
                    "cancellation": check_cancellation(server, name, examples[0]),
                }
    return result


def commit() -> str:
    """Of the working tree, as git or the environment says."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> int:
    """Run all; 0 if nothing failed and every difference is explained."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("perf/results/h200/gpu-test.json"))
    parser.add_argument("--limit", type=int, help="only the first held-out questions")
    parser.add_argument("--commit", help="where git does not know")
    arguments = parser.parse_args()
    counter = Counter()
    command = ["tests/gpu", "-m", "gpu", "--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-v"]
    code = pytest.main(command, plugins=[counter])
    result: dict[str, Any] = {"commit": arguments.commit or commit(), **counter.outcomes, "errors": counter.errors}
    build = Manifest.load(ENGINES / "fid").build
    assert build is not None
    result |= {"gpu": build.gpu, "tensorrt": build.version, "limits": dataclasses.asdict(Limits())}
    try:
        result["served"] = serve_and_ask(arguments.limit)
    except Exception as error:  # the tests' outcomes are worth keeping all the same
        result["served_error"] = f"{type(error).__name__}: {error}"
        result["failed"] += 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "errors"}, indent=2))
    served = result.get("served", {})
    explained = all(all(d["near_tie"] for d in r["differences"]) and not r["failed"] for r in served.values())
    return 0 if code == 0 and served and explained else 1


if __name__ == "__main__":
    sys.exit(main())
