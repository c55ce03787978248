"""Compiles all graphs of a GPU reader where there is no GPU: TensorRT-RTX has TensorRT 11's interface and parser, and needs none.

    python -m tests.export.tensorrt.build_with_rtx GRAPHS [VERSION]

With VERSION it stands in for the full TensorRT of that version, which is imported as `tensorrt`: 11 as it is, without all that 11 removed;
10 with the values that its network flags had, and a refusal of every network that is not strongly typed. The last line is JSON: the flags
that were set, and per engine its bytes, the types of its tensors and the profiles as the builder has them.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any


def stand_in(version: str) -> types.ModuleType:
    """A module to import as `tensorrt`."""
    import tensorrt_rtx_bindings as rtx

    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})
    trt.__dict__["__version__"] = version
    for removed in ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"):
        assert not hasattr(rtx.BuilderFlag, removed), f"the stand-in has {removed}, which TensorRT 11 removed"
    assert not hasattr(rtx.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") and not hasattr(rtx.ILayer, "precision")
    if version.startswith("10."):

        class Flags10:
            EXPLICIT_BATCH, STRONGLY_TYPED = range(2)
            __members__ = rtx.NetworkDefinitionCreationFlag.__members__  # Polygraphy prints which of them a network has

        class Builder10(rtx.Builder):
            def create_network(self, flags: int = 0) -> Any:
                if flags != 1 << Flags10.STRONGLY_TYPED:
                    raise AssertionError(f"TensorRT 10: wanted a strongly typed network and no other flag, got {flags:#b}")
                return super().create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

        trt.__dict__.update({"NetworkDefinitionCreationFlag": Flags10, "Builder": Builder10})
    return trt


class Recorder:
    """Builds as Polygraphy does, and notes what is built."""

    def __init__(self) -> None:
        import polygraphy.backend.trt as backend

        self._build, self._profile = backend.engine_bytes_from_network, backend.Profile.to_trt
        self.flags: set[int] = set()
        self.network: list[Any] = []
        self.profiles: list[Any] = []
        backend.engine_bytes_from_network = self.build
        recorder = self

        def to_trt(profile: Any, builder: Any, network: Any) -> Any:
            made = recorder._profile(profile, builder, network)
            names = [network.get_input(i).name for i in range(network.num_inputs)]
            recorder.profiles.append({name: [tuple(shape) for shape in made.get_shape(name)] for name in names})
            return made

        backend.Profile.to_trt = to_trt

    def build(self, parts: Any, config: Any) -> Any:
        """Note the network and the flags of the configuration, then build."""
        _, network, _ = parts
        self.flags.add(int(config.flags))
        tensors = [network.get_input(i) for i in range(network.num_inputs)] + [network.get_output(i) for i in range(network.num_outputs)]
        self.network = [(t.name, str(t.dtype).split(".")[-1].lower(), tuple(t.shape)) for t in tensors]
        return self._build(parts, config=config)


def main() -> None:
    graphs = Path(sys.argv[1])
    if len(sys.argv) > 2:
        sys.modules["tensorrt"] = stand_in(sys.argv[2])
    else:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    from export.tensorrt.compiler import Compiler, tasks_of
    from serving.contract.limits import Limits
    from serving.contract.manifest import Manifest

    manifest = Manifest.load(graphs)
    compiler = Compiler(manifest.precision)
    recorder = Recorder()
    engines = {}
    for task in tasks_of(manifest, Limits(slots=8, encoder_batch=120)):
        recorder.profiles.clear()
        plan = compiler.compile(graphs / f"{task.name}.onnx", task.profiles)
        engines[task.name] = {"bytes": len(plan), "tensors": recorder.network, "profiles": list(recorder.profiles)}
    print(json.dumps({"flags": sorted(recorder.flags), "engines": engines}))


if __name__ == "__main__":
    main()
