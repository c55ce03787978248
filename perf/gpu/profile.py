"""The time of a TensorRT engine by layer: `python -m perf.gpu.profile PLAN NAME=SHAPE ...` lists each layer's time, share and tactic.

The times come from TensorRT's profiler, which serializes the layers: their sum exceeds the time of an engine without it, which is printed
as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import cupy as cp
import tensorrt as trt

WARM_UP, ROUNDS = 3, 10


@dataclasses.dataclass
class Layer:
    """One layer of an engine, and its mean time in milliseconds."""

    name: str
    kind: str
    tactic: str
    ms: float = 0.0


class _Times(trt.IProfiler):
    """Collects the times that TensorRT reports."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.ms: dict[str, float] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Called by TensorRT once per layer and run."""
        self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms


def profile(plan: bytes, shapes: dict[str, tuple[int, ...]]) -> tuple[float, list[Layer]]:
    """Milliseconds of one run without the profiler, and the layers in order.

    Args:
        plan: a serialized engine.
        shapes: of the inputs; integers are filled with 1, the rest with random numbers.

    Raises:
        ValueError: TensorRT cannot load the plan or does not accept the shapes.
    """
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    if engine is None:
        raise ValueError(f"plan: wanted an engine that TensorRT {trt.__version__} can load; build it again with this version")
    context = engine.create_execution_context()
    buffers = []
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise ValueError(f"{name}: wanted a shape within the engine's optimization profile, got {list(shape)}")
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype = trt.nptype(engine.get_tensor_dtype(name))
        array = cp.ones(tuple(context.get_tensor_shape(name)), dtype)
        if array.dtype.kind == "f":
            array[...] = cp.random.standard_normal(array.shape).astype(dtype)
        context.set_tensor_address(name, array.data.ptr)
        buffers.append(array)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    start, end = cp.cuda.Event(), cp.cuda.Event()
    for run in range(WARM_UP + ROUNDS):
        if run == WARM_UP:
            start.record(stream)
        context.execute_async_v3(stream.ptr)
    end.record(stream)
    end.synchronize()
    alone = cp.cuda.get_elapsed_time(start, end) / ROUNDS
    times = _Times()
    context.profiler = times
    for _ in range(ROUNDS):
        context.execute_async_v3(stream.ptr)
        stream.synchronize()
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    # strict=False: 8.6 leaves line breaks in its strings
    described = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON), strict=False)["Layers"]
    layers = []
    for entry in described:
        if isinstance(entry, str):
            layers.append(Layer(entry, "", ""))
        else:
            layers.append(Layer(entry["Name"], entry.get("LayerType", ""), str(entry.get("TacticName", ""))))
    known = {layer.name: layer for layer in layers}
    for name, ms in times.ms.items():
        if name not in known:
            known[name] = Layer(name, "", "")
            layers.append(known[name])
        known[name].ms = ms / ROUNDS
    del buffers
    return float(alone), layers


def table(alone_ms: float, layers: list[Layer]) -> str:
    """One line per layer that takes time, and the sums."""
    total = sum(layer.ms for layer in layers)
    lines = [f"{'ms':>9} {'share':>6}  layer"]
    for layer in layers:
        if layer.ms:
            lines.append(f"{layer.ms:9.4f} {layer.ms / total:6.1%}  {layer.kind} {layer.name[:150]} {layer.tactic}")
    return "\n".join([*lines, f"{total:9.4f} sum of {sum(1 for layer in layers if layer.ms)} layers; undisturbed {alone_ms:.4f} ms"])


def main(argv: list[str] | None = None) -> int:
    """Profile one engine file."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.profile", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("shapes", nargs="+", metavar="NAME=4x256", help="shape of every input")
    arguments = parser.parse_args(argv)
    shapes: dict[str, tuple[int, ...]] = {}
    for text in arguments.shapes:
        name, _, sizes = text.partition("=")
        shapes[name] = tuple(int(size) for size in sizes.split("x"))
    print(table(*profile(arguments.plan.read_bytes(), shapes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
