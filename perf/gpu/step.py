"""The time of a decoder step on a GPU by kind of operation: `python -m perf.gpu.step ENGINES` measures the step without each kind.

A step is one CUDA graph of about a hundred kernels of a few microseconds each, so a profiler between kernels would distort it. Instead the
step is captured again without one kind of operation; the difference is the cost of that kind. The kind is also measured alone, and the step
once with all GEMMs by the engines. Questions are random, of full length; the step is at position --position of every answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np

from perf.bounds.statistics import publish
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.engines.gpu.cuda_graph import CudaGraph
from serving.engines.gpu.decoder import LENGTHS, POSITIONS, SLOTS, GpuDecoder
from serving.engines.gpu.weights import LoadedGemm
from serving.engines.load import load_decoder

ROUNDS = 30


def gpu_ms(stream: cp.cuda.Stream, work: Any) -> float:
    """GPU milliseconds of `work()` on the stream."""
    start, end = cp.cuda.Event(), cp.cuda.Event()
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return float(cp.cuda.get_elapsed_time(start, end))


def fill(decoder: GpuDecoder, batch: int, tokens: int) -> None:
    """Admit `batch` random questions of `tokens` encoded tokens each."""
    hidden = cp.random.standard_normal((tokens, decoder.sizes.d_model_encoder)).astype(cp.float16) * cp.float16(0.1)
    cp.cuda.Device().synchronize()
    for slot in range(batch):
        decoder.admit(slot, slot, hidden, np.zeros(tokens, np.int32))
    decoder._stream.synchronize()


def kind_of(operation: Any) -> str:
    """The kind of an operation in a step's program: a GEMM by its shape, a kernel by its name."""
    owner = getattr(operation.func, "__self__", None)
    if isinstance(owner, LoadedGemm):
        return "gemm " + " x ".join(map(str, owner.weight.shape))
    return str(operation.func.__name__)


def graph_us(decoder: GpuDecoder, operations: Sequence[Callable[[], None]], *, dependent_launch: bool = True) -> float:
    """Minimum microseconds of a CUDA graph of these operations."""
    stream = decoder._stream

    def run() -> None:
        for operation in operations:
            operation()

    with stream:
        run()  # TensorRT must have run a shape before its capture
        stream.synchronize()
        graph = CudaGraph(stream, run, dependent_launch=dependent_launch)
        graph.launch(stream)
        stream.synchronize()
        return min(gpu_ms(stream, lambda: graph.launch(stream)) for _ in range(ROUNDS)) * 1e3


def profile(decoder: GpuDecoder, batch: int, tokens: int, position: int) -> dict[str, Any]:
    """Microseconds of the step: complete, without dependent launches, with engines only, and for each kind of operation.

    For a kind: how often it occurs, by how much the step is shorter without it, and its time alone.
    """
    program = decoder._program(batch, False)
    state = decoder._host_state
    state[:] = 0
    state[POSITIONS], state[SLOTS, :batch], state[LENGTHS, :batch] = position, range(batch), tokens
    decoder._state.set(state, stream=decoder._stream)
    kinds = [kind_of(operation) for operation in program]
    skinny_gemm = next(iter(decoder._gemms.values())).skinny_gemm
    in_turn, whole = graph_us(decoder, program, dependent_launch=False), graph_us(decoder, program)
    found = {}
    for kind in dict.fromkeys(kinds):
        without = graph_us(decoder, [operation for operation, other in zip(program, kinds, strict=True) if other != kind])
        alone = graph_us(decoder, [operation for operation, other in zip(program, kinds, strict=True) if other == kind])
        found[kind] = {"times": kinds.count(kind), "less_without_us": round(whole - without, 1), "alone_us": round(alone, 1)}
    for loaded in decoder._gemms.values():
        loaded.skinny_gemm = None
    by_engines = graph_us(decoder, decoder._program(batch, False))
    for loaded in decoder._gemms.values():
        loaded.skinny_gemm = skinny_gemm
    steps = {"step_us": whole, "step_in_turn_us": in_turn, "step_by_engines_us": by_engines}
    return {**{name: round(us, 1) for name, us in steps.items()}, "operations": found}


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.step", description=__doc__)
    parser.add_argument("engines", type=Path)
    parser.add_argument("--slots", type=int, default=24, help="the slots that the engines were built for")
    parser.add_argument("--max-passages", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 24])
    parser.add_argument("--position", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    manifest = Manifest.load(arguments.engines)
    decoder: GpuDecoder = load_decoder(  # type: ignore[assignment]
        arguments.engines, manifest, Limits(slots=arguments.slots, max_passages=arguments.max_passages)
    )
    tokens = arguments.max_passages * manifest.prompt.passage_length
    fill(decoder, max(arguments.batches), tokens)
    name = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    steps = {str(batch): profile(decoder, batch, tokens, arguments.position) for batch in arguments.batches}
    publish({"gpu": name, "reader": manifest.reader, "position": arguments.position, "batches": steps}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
