"""The engines of a GPU reader without Triton and tokenizer: encoder time and rate, step time at each batch, memory.

Every round alternates between FiD and FiDO. Times are GPU times from CUDA events, after warm-up. perf/peers/torch_gpu.py measures the peer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from tokenizers import Tokenizer

from export.checkpoint.config import ReaderConfig, reader_preset
from fido_client.data.examples import read_examples
from perf.bounds.cost import H200, Workload, encoder_cost, step_cost
from perf.bounds.statistics import publish, spread
from serving.contract.call_sizes import bucket_of, calls_of_tokens
from serving.contract.limits import Limits
from serving.contract.manifest import TOKENIZER_FILE, Manifest
from serving.engines.gpu.decoder import GpuDecoder
from serving.engines.gpu.encoder import GpuEncoder
from serving.engines.load import load_decoder, load_encoder
from serving.pipeline.prompt import PromptEncoder

READERS = ("fid", "fido")


def gpu_ms(stream: cp.cuda.Stream, work: Any) -> float:
    """GPU milliseconds of `work()` on the stream."""
    start, end = cp.cuda.Event(), cp.cuda.Event()
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(cp.cuda.get_elapsed_time(start, end))


def measure_encoder(encoder: GpuEncoder, lengths: np.ndarray, rounds: int) -> list[float]:
    """Milliseconds for passages of these lengths, in calls of the maximum size; token ids are random and packed beforehand."""
    rng = np.random.default_rng(0)
    tokens, places = rng.integers(2, 30000, lengths.sum()), np.arange(lengths.sum())
    with encoder._stream:
        hidden = cp.empty((len(tokens), encoder.sizes.d_model), cp.float16)

        def work() -> None:
            for part, of_call in calls_of_tokens(lengths, encoder.max_tokens_per_call):
                encoder._encode_call(tokens[part], places[part], of_call, hidden)

        work()
        encoder._stream.synchronize()
        return [gpu_ms(encoder._stream, work) for _ in range(rounds)]


def real_lengths(engines: Path, data: Path, passages: int) -> np.ndarray:
    """Prompt lengths in tokens of the first `passages` passages of a data file, by the reader's tokenizer."""
    prompt = PromptEncoder(Tokenizer.from_file(str(engines / TOKENIZER_FILE)), Manifest.load(engines))
    found: list[int] = []
    for example in read_examples(data):
        encoded = prompt.encode(example.question, [c.text for c in example.contexts], [c.title or "" for c in example.contexts])
        found += encoded.attention_mask.sum(1).tolist()
        if len(found) >= passages:
            return np.array(found[:passages])
    raise SystemExit(f"error: {data}: wanted {passages} passages, got {len(found)}")


def fill(decoder: GpuDecoder, batch: int, tokens: int) -> None:
    """Admit `batch` random questions of `tokens` encoded tokens each."""
    hidden = cp.random.standard_normal((tokens, decoder.sizes.d_model_encoder)).astype(cp.float16) * cp.float16(0.1)
    cp.cuda.Device().synchronize()
    for slot in range(batch):
        decoder.admit(slot, slot, hidden, np.zeros(tokens, np.int32))
    decoder._stream.synchronize()


def measure_steps(decoder: GpuDecoder, batch: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step as the scheduler sees it, and of its CUDA graph alone."""
    tokens, penalty = np.full(batch, 5, np.int32), np.full(batch, -1e9, np.float32)
    wall, graph = [], []
    for step in range(steps):
        started = time.perf_counter()
        decoder.step(tokens, np.full(batch, step + 1, np.int32), penalty)
        wall.append((time.perf_counter() - started) * 1e3)
    run = decoder._steps[bucket_of(batch, decoder._buckets), False]
    with decoder._stream:
        for _ in range(steps):
            graph.append(gpu_ms(decoder._stream, run))
    return {"wall_ms": wall[2:], "graph_ms": graph[2:]}


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.engines", description=__doc__)
    parser.add_argument("--fid", type=Path, help="engines; one of the two readers is enough")
    parser.add_argument("--fido", type=Path)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--slots", type=int, default=24)
    parser.add_argument("--max-passages", type=int, default=40)
    parser.add_argument("--encoder-batch", type=int, default=120)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 24])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="data file whose passage lengths to measure as well")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    readers = [name for name in READERS if getattr(arguments, name)]
    limits = Limits(slots=arguments.slots, max_passages=arguments.max_passages, encoder_batch=arguments.encoder_batch)
    result: dict[str, Any] = {"preset": arguments.preset}
    decoders: dict[str, GpuDecoder] = {}
    encoders: dict[str, GpuEncoder] = {}
    configs: dict[str, ReaderConfig] = {}
    for name in readers:
        directory = getattr(arguments, name)
        manifest = Manifest.load(directory)
        started = time.perf_counter()
        encoders[name] = load_encoder(directory, manifest, limits)  # type: ignore[assignment]
        decoders[name] = load_decoder(directory, manifest, limits)  # type: ignore[assignment]
        configs[name] = reader_preset(arguments.preset, fido=name == "fido")
        build = manifest.build
        result[name] = {
            "load_s": round(time.perf_counter() - started, 1),
            "memory": str(decoders[name].memory),
            "encoder_mb": round(encoders[name].bytes / 1e6),
            "build_s": build.seconds if build else None,
        }
        length = manifest.prompt.passage_length
    questions = arguments.slots
    passages = questions * arguments.max_passages
    work = Workload(questions, arguments.max_passages, length, 32)
    wanted = {"encoder_ms": np.full(passages, length), "encoder_one_question_ms": np.full(arguments.max_passages, length)}
    if arguments.data:
        wanted["encoder_real_lengths_ms"] = real_lengths(getattr(arguments, readers[0]), arguments.data, passages)
    for what, lengths in wanted.items():
        encoder_ms: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(arguments.rounds):
            for name in readers:
                encoder_ms[name] += measure_encoder(encoders[name], lengths, 1)
        for name in readers:
            figures: dict[str, float] = {"passages": len(lengths), "tokens": int(lengths.sum())}
            figures["us_a_token"] = round(statistics.median(encoder_ms[name]) * 1e3 / figures["tokens"], 4)
            if what == "encoder_ms":
                figures["tflops"] = round(encoder_cost(configs[name], work, 2).flops / statistics.median(encoder_ms[name]) / 1e9, 1)
            result[name][what] = spread(encoder_ms[name]) | figures
    tokens = arguments.max_passages * length
    for name in readers:
        fill(decoders[name], arguments.slots, tokens)
    for batch in arguments.batches:
        samples: dict[str, dict[str, list[float]]] = {name: {"wall_ms": [], "graph_ms": []} for name in readers}
        for _ in range(arguments.rounds):
            for name in readers:
                for key, values in measure_steps(decoders[name], batch, arguments.steps).items():
                    samples[name][key] += values
        for name in readers:
            bound = step_cost(configs[name], Workload(batch, arguments.max_passages, length, 32), 2).bound_s(H200) * 1e3
            found = {key: spread(values) for key, values in samples[name].items()}
            result[name][f"step_batch_{batch}"] = found | {"bound_ms": round(bound, 3)}
    publish(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
