"""The peer on the GPU: PyTorch with the same sizes and random weights; SDPA encoder, decoder step eager and as a CUDA graph.

It needs a Python that has torch with CUDA. Its JSON has the keys of perf/gpu/engines.py, for comparison.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from export.checkpoint.config import reader_preset
from export.graphs.cpu import DecoderStepGraph
from export.model.reader import Reader
from perf.bounds.cost import Workload, encoder_cost
from perf.bounds.statistics import publish, spread

READERS = ("fid", "fido")


def gpu_ms(work: Callable[[], object]) -> float:
    """GPU milliseconds of `work()`."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@torch.inference_mode()
def measure_encoder(reader: Reader, questions: int, passages: int, length: int, batch: int, rounds: int) -> list[float]:
    """Milliseconds for all passages, in calls of `batch`."""
    ids = torch.randint(2, 30000, (batch, length), device="cuda")
    mask = torch.ones_like(ids)

    def work() -> None:
        for _ in range(questions * passages // batch):
            reader.encoder(reader.embedding(ids), mask)

    work()
    return [gpu_ms(work) for _ in range(rounds)]


@torch.inference_mode()
def measure_steps(reader: Reader, batch: int, tokens: int, past: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one step, eager and replayed from a CUDA graph."""
    stack, dtype = reader.config.decoder, torch.bfloat16
    graph = DecoderStepGraph(reader.cpu()).cuda()
    shape = (batch, stack.num_kv_heads)
    ids = torch.full((batch,), 5, dtype=torch.int32, device="cuda")
    inputs = [ids, torch.full_like(ids, past), torch.full_like(ids, tokens), torch.zeros(batch, device="cuda")]
    inputs += [torch.zeros(*shape, past, stack.d_kv, dtype=dtype, device="cuda") for _ in range(2 * stack.num_layers)]
    layers = reader.config.cross_attention_layers
    inputs += [torch.randn(*shape, tokens, stack.d_kv, dtype=dtype, device="cuda") for _ in range(2 * len(layers))]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            graph(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    eager = [gpu_ms(lambda: graph(*inputs)) for _ in range(rounds)]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        graph(*inputs)
    captured.replay()
    return {"eager_ms": eager, "cuda_graph_ms": [gpu_ms(captured.replay) for _ in range(rounds)]}


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m perf.peers.torch_gpu", description=__doc__)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--passage-length", type=int, default=256)
    parser.add_argument("--encoder-batch", type=int, default=120)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 24])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"torch": torch.__version__, "precision": "bfloat16"}
    for name in READERS:
        config = reader_preset(arguments.preset, fido=name == "fido")
        reader = Reader(config)
        reader.reset_parameters(0)
        reader = reader.bfloat16().cuda().eval()
        measured = measure_encoder(
            reader, arguments.questions, arguments.passages, arguments.passage_length, arguments.encoder_batch, arguments.rounds
        )
        work = Workload(arguments.questions, arguments.passages, arguments.passage_length, 32)
        encoder = spread(measured)
        found: dict[str, Any] = {
            "encoder_ms": encoder | {"tflops": round(encoder_cost(config, work, 2).flops / encoder["median"] / 1e9, 1)}
        }
        for batch in arguments.batches:
            steps = measure_steps(reader, batch, arguments.passages * arguments.passage_length, 32, arguments.rounds)
            found[f"step_batch_{batch}"] = {key: spread(values) for key, values in steps.items()}
        result[name] = found
        del reader
        torch.cuda.empty_cache()
    publish(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
