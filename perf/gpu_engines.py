"""The engines of a GPU reader by themselves: encoder time and rate, step time at each batch, memory. No Triton, no tokenizer.

FiD and FiDO take turns in every round; times are of the GPU, by CUDA events, after warm-up. Peers are measured by perf/torch_gpu.py.
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

from export.config import ReaderConfig, reader_preset
from serving.engines import load_decoder, load_encoder
from serving.gpu_decoder import GpuDecoder
from serving.gpu_encoder import GpuEncoder
from serving.gpu_plan import encoder_batch
from serving.limits import Limits
from serving.manifest import Manifest

from .cost import H200, Workload, encoder_cost, step_cost
from .gpu_statistics import publish, spread

READERS = ("fid", "fido")


def gpu_ms(stream: cp.cuda.Stream, work: Any) -> float:
    """Milliseconds that `work()` keeps the stream busy."""
    start, end = cp.cuda.Event(), cp.cuda.Event()
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(cp.cuda.get_elapsed_time(start, end))


def measure_encoder(encoder: GpuEncoder, limits: Limits, questions: int, passage_length: int, rounds: int) -> list[float]:
    """Milliseconds for all passages of `questions` questions at full length, in calls of the largest batch."""
    batch = encoder_batch(limits)
    calls = questions * limits.max_passages // batch
    stream = encoder._stream
    with stream:
        ids = cp.random.randint(2, 30000, (batch, passage_length)).astype(cp.int32)
        mask = cp.ones_like(ids)
        hidden = cp.empty((batch, passage_length, encoder.d_model), cp.float16)
        call = encoder._engine.bind({"input_ids": ids, "attention_mask": mask}, {"encoder_hidden_states": hidden})

        def work() -> None:
            for _ in range(calls):
                call.enqueue(stream)

        work()
        stream.synchronize()
        return [gpu_ms(stream, work) for _ in range(rounds)]


def fill(decoder: GpuDecoder, batch: int, tokens: int) -> None:
    """Admit `batch` random questions of so many encoded tokens."""
    hidden = cp.random.standard_normal((tokens, decoder.sizes.d_model_encoder)).astype(cp.float16) * cp.float16(0.1)
    cp.cuda.Device().synchronize()
    for slot in range(batch):
        decoder.admit(slot, slot, hidden, np.zeros(tokens, np.int32))
    decoder._stream.synchronize()


def measure_steps(decoder: GpuDecoder, batch: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step as the decode loop sees it, and of its graph alone."""
    tokens, penalty = np.full(batch, 5, np.int32), np.full(batch, -1e9, np.float32)
    wall, graph = [], []
    for step in range(steps):
        started = time.perf_counter()
        decoder.step(tokens, np.full(batch, step + 1, np.int32), penalty)
        wall.append((time.perf_counter() - started) * 1e3)
    run = decoder._steps[min(bucket for bucket in decoder._steps if bucket >= batch)]
    with decoder._stream:
        for _ in range(steps):
            graph.append(gpu_ms(decoder._stream, run))
    return {"wall_ms": wall[2:], "graph_ms": graph[2:]}


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu_engines", description=__doc__)
    parser.add_argument("--fid", type=Path, help="engines; either reader may be left out")
    parser.add_argument("--fido", type=Path)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--slots", type=int, default=24)
    parser.add_argument("--max-passages", type=int, default=40)
    parser.add_argument("--encoder-batch", type=int, default=120)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 24])
    parser.add_argument("--rounds", type=int, default=5)
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
    work = Workload(questions, arguments.max_passages, length, 32)
    encoder_ms: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(arguments.rounds):
        for name in readers:
            encoder_ms[name] += measure_encoder(encoders[name], limits, questions, length, 1)
    for name in readers:
        flops = encoder_cost(configs[name], work, 2).flops
        median = statistics.median(encoder_ms[name])
        result[name]["encoder_ms"] = spread(encoder_ms[name]) | {
            "tflops": round(flops / median / 1e9, 1),
            "passages": questions * arguments.max_passages,
        }
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
