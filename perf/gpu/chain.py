"""The complete chain on a GPU: full-length questions through Triton over gRPC, one at a time and concurrently, FiD and FiDO in turn.

Weights are random, so answer lengths are forced. The prompt truncates passages to the reader's full length. Times include gRPC,
tokenization, encoder and decoder; start-up and a first round are excluded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.repository import repository_from_engines
from fido_client.data.examples import read_examples
from fido_client.metrics import percentile
from fido_client.reader_client import ReaderClient
from perf.bounds.statistics import publish, spread
from serving.contract.limits import Limits
from serving.launcher.server import TritonServer, model_statistics, models_of

READERS = ("fid", "fido")
CHARACTERS = 1100  # more than 256 tokens of the demo readers' vocabulary


def passages_of(texts: list[str], question: int, count: int) -> list[str]:
    """`count` passages that are longer than any reader reads, different for every question."""
    made = []
    for i in range(count):
        place, passage = (question * count + i) * 7, ""
        while len(passage) < CHARACTERS:
            passage += texts[place % len(texts)] + " "
            place += 1
        made.append(passage[:CHARACTERS])
    return made


def ask(client: ReaderClient, texts: list[str], question: int, passages: int, new_tokens: int) -> float:
    """Seconds that one question takes."""
    chosen = passages_of(texts, question, passages)
    started = time.perf_counter()
    answer = client.answer(f"question number {question}", chosen, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    assert answer.tokens == new_tokens, answer.tokens
    return time.perf_counter() - started


def main() -> int:
    """Serve both readers, measure, print JSON."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.chain", description=__doc__)
    parser.add_argument("--fid", type=Path, help="engines; either reader may be left out")
    parser.add_argument("--fido", type=Path)
    parser.add_argument("--data", type=Path, default=Path("build/corpus/heldout.jsonl"))
    parser.add_argument("--slots", type=int, default=24)
    parser.add_argument("--encoder-batch", type=int, default=120)
    parser.add_argument("--encoder-instances", type=int, default=1)
    parser.add_argument("--reader-instances", type=int, default=1)
    parser.add_argument("--encode-threads", type=int, default=16)
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--alone", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    readers = [name for name in READERS if getattr(arguments, name)]
    limits = Limits(
        slots=arguments.slots,
        max_passages=arguments.passages,
        encoder_batch=arguments.encoder_batch,
        encoder_instances=arguments.encoder_instances,
        reader_instances=arguments.reader_instances,
        encode_threads=arguments.encode_threads,
    )
    texts = [c.text for example in read_examples(arguments.data, limit=400) for c in example.contexts]
    result: dict[str, Any] = {key: value for key, value in vars(arguments).items() if isinstance(value, int)}
    alone: dict[str, list[float]] = {name: [] for name in readers}
    rates: dict[str, list[float]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as scratch:
        for name in readers:
            repository_from_engines(getattr(arguments, name), Path(scratch), name, limits)
        with TritonServer(models_of(readers, stream=False), Path(scratch), log=Path("build/gpu-chain-tritonserver.log")) as server:
            for _ in range(arguments.rounds):
                for name in readers:
                    with ReaderClient(server.grpc_url, name) as client, ThreadPoolExecutor(arguments.concurrency) as pool:

                        def one(question: int, client: ReaderClient = client) -> float:
                            return ask(client, texts, question, arguments.passages, arguments.new_tokens)

                        for question in range(3):
                            one(question)
                        alone[name] += [one(question) for question in range(arguments.alone)]
                        list(pool.map(one, range(arguments.concurrency)))
                        started = time.perf_counter()
                        seconds = list(pool.map(one, range(arguments.questions)))
                        rates[name].append(arguments.questions / (time.perf_counter() - started))
                        result[f"{name}_p50_p99_ms_at_{arguments.concurrency}"] = [round(percentile(seconds, p) * 1e3, 1) for p in (50, 99)]
            result["statistics"] = {model: model_statistics(server, model) for model in server.models}
            with urllib.request.urlopen(server.metrics_url, timeout=5) as response:
                lines = response.read().decode().splitlines()
            result["metrics"] = [line for line in lines if line.startswith(("encoder_", "reader_step", "reader_generated", "nv_gpu"))]
    for name in readers:
        result[f"{name}_alone_ms"] = spread([s * 1e3 for s in alone[name]])
        result[f"{name}_questions_per_s"] = spread(rates[name])
    publish(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
