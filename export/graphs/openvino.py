"""A CPU reader's graphs for the engine and the precision that run them, and which engine is the faster here.

Comes in: exported graphs with their manifest. Goes out: the same directory with the manifest of its engine, in bf16 or int8 if asked. ONNX
Runtime and OpenVINO read the same fp32 files; both are timed on the same question where the engine is left to us. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import UsageError
from export.manifest_writer import hashes, write_manifest
from serving.contract.call_sizes import lanes_of
from serving.contract.manifest import MANIFEST_FILE, Manifest, cpu_name, require_bf16
from serving.contract.tensors import NUMPY_DTYPES, GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors

# The question that engines are timed on: a short one, since every passage costs a large reader a second.
PASSAGES, STEPS, ROUNDS = 4, 8, 3
# OpenVINO is chosen if it takes at most this share of ONNX Runtime's time: a difference below is noise, and not worth another package.
WORTH_IT = 0.9

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
Load = Callable[..., list[Run]]


def require_openvino(precision: str, samples: Path | None) -> None:
    """Raise before anything is exported.

    Args:
        precision: of for_openvino.
        samples: that int8 is calibrated on.

    Raises:
        UsageError: if OpenVINO is not installed, or what int8 needs is missing.
        EngineError: if this CPU would emulate `precision`.
    """
    if importlib.util.find_spec("openvino") is None:
        raise UsageError(
            "engine openvino: not installed; `make setup FOR=openvino` installs it, and ENGINE=onnxruntime PRECISION=fp32 does without"
        )
    if precision == "bfloat16":
        require_bf16("engine openvino")
    if precision == "int8":
        from .int8 import require_nncf

        require_nncf(samples)


def for_openvino(directory: Path, manifest: Manifest, precision: str, samples: Path | None = None) -> Manifest:
    """Make exported graphs those of OpenVINO.

    Args:
        directory: of the graphs; its manifest is written again.
        manifest: as exported.
        precision: "float32", "bfloat16", or "int8", which becomes "int8-bf16" where bf16 in what is not int8 hardly adds to the error.
        samples: that int8 is calibrated on.

    Raises:
        ExportError: if there is nothing to calibrate on.
    """
    versions = {**manifest.provenance.get("versions", {}), "openvino": importlib.metadata.version("openvino")}
    provenance = {**manifest.provenance, "versions": versions}
    files = manifest.files
    if precision == "int8" and samples is not None:
        from .int8 import rest_is_bf16, to_int8

        done = to_int8(directory, manifest, samples)
        provenance |= {"int8": done, "versions": versions | {"nncf": importlib.metadata.version("nncf")}}
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        files = hashes(directory)
        if rest_is_bf16(done):
            precision = "int8-bf16"
    elif precision == "bfloat16":
        provenance |= {"precision_ms": bf16_beside_fp32(directory, manifest)}
    changed = dataclasses.replace(manifest, engine="openvino", precision=precision, provenance=provenance, files=files)
    return write_manifest(changed, directory)


def bf16_beside_fp32(directory: Path, manifest: Manifest) -> dict[str, float]:
    """Milliseconds of a question in fp32 and in bf16 on OpenVINO; a warning where bf16 is the slower, as on CPUs with slow bf16 units."""
    ways: dict[str, Load] = {"float32": openvino_runs, "bfloat16": functools.partial(openvino_runs, precision="bf16")}
    times = {precision: round(ms, 2) for precision, ms in question_ms(directory, manifest, ways).items()}
    if times["bfloat16"] > times["float32"]:
        print(
            f"warning: bf16 is slower than fp32 on {cpu_name()}: {times['bfloat16']:,.1f} ms for {times['float32']:,.1f} ms a question; "
            "leave PRECISION out, or take int8",
            file=sys.stderr,
        )
    return times


def for_onnxruntime_int8(directory: Path, manifest: Manifest) -> Manifest:
    """Make exported graphs int8 ones of ONNX Runtime; the directory's manifest is written again."""
    from .int8 import to_onnxruntime_int8

    provenance = {**manifest.provenance, "int8": to_onnxruntime_int8(directory, manifest)}
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    changed = dataclasses.replace(manifest, precision="int8", provenance=provenance, files=hashes(directory))
    return write_manifest(changed, directory)


def for_the_faster(directory: Path, manifest: Manifest) -> Manifest:
    """Time both engines on the exported graphs, in fp32, and make them those of the faster; the times are kept in the manifest.

    Args:
        directory: of the graphs; its manifest is written again.
        manifest: as exported.
    """
    times = question_ms(directory, manifest, RUNS)
    chosen = "openvino" if times["openvino"] <= WORTH_IT * times["onnxruntime"] else "onnxruntime"
    measured = {"cpu": cpu_name(), "question_ms": {engine: round(ms, 2) for engine, ms in times.items()}}
    manifest = dataclasses.replace(manifest, provenance={**manifest.provenance, "chosen_engine": measured})
    return for_openvino(directory, manifest, manifest.precision) if chosen == "openvino" else write_manifest(manifest, directory)


def question_ms(directory: Path, manifest: Manifest, ways: Mapping[str, Load]) -> dict[str, float]:
    """Milliseconds of a question of PASSAGES full passages and STEPS tokens, by way: medians of ROUNDS alternating rounds.

    Args:
        directory: of the graphs.
        manifest: as exported.
        ways: name -> what loads a graph, as RUNS.
    """
    length = manifest.prompt.passage_length
    lengths = {"passages": PASSAGES, "passage_length": length, "batch": 1, "past_length": 16, "encoder_sequence_length": PASSAGES * length}
    lengths |= {"questions": 1, "beams": 1}
    step_tensors = functools.partial(decoder_step_tensors, beams=True)
    graphs: dict[str, tuple[Callable[..., GraphTensors], int]] = {
        "encoder": (encoder_tensors, 1),
        "cross_kv": (cross_kv_tensors, 1),
        "decoder_step": (step_tensors, STEPS),
    }
    lanes = lanes_of(len(os.sched_getaffinity(0)))
    work: dict[str, list[tuple[list[Run], dict[str, np.ndarray], int]]] = {way: [] for way in ways}
    for name, (tensors_of, times) in graphs.items():
        at_a_time = lanes if name == "encoder" else 1
        inputs = _plain_inputs(tensors_of(manifest.sizes), lengths | {"passages": PASSAGES // at_a_time})
        for way, load in ways.items():
            runs = load(directory / f"{name}.onnx", lanes=at_a_time)
            for run in runs:  # makes the kernels; on this thread, since two first calls of OpenVINO's binding at once block each other
                run(inputs)
            work[way].append((runs, inputs, times))
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with ThreadPoolExecutor(lanes) as pool:
        for _ in range(ROUNDS):
            for way, parts in work.items():
                started = time.perf_counter()
                for runs, inputs, times in parts:
                    for _ in range(times):
                        list(pool.map(lambda run, given: run(given), runs, itertools.repeat(inputs)))
                taken[way].append((time.perf_counter() - started) * 1e3)
    return {way: statistics.median(found) for way, found in taken.items()}


def _plain_inputs(tensors: GraphTensors, lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Ones: valid tokens, positions, lengths and features. How long a graph takes does not depend on them. Indices of rows are zeros."""
    inputs = {spec.name: np.ones(spec.shape(lengths), NUMPY_DTYPES[spec.dtype]) for spec in tensors.inputs}
    return inputs | {name: np.zeros_like(inputs[name]) for name in ("question_rows", "row_places") if name in inputs}


def onnxruntime_runs(path: Path, *, lanes: int = 1) -> list[Run]:
    """A graph in ONNX Runtime, in fp32, on lanes that run at the same time: inputs by name -> outputs in their order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 0 if lanes == 1 else max(len(os.sched_getaffinity(0)) // lanes, 1)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as it serves
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [functools.partial(session.run, None)] * lanes


def openvino_runs(path: Path, *, lanes: int = 1, precision: str = "f32") -> list[Run]:
    """A graph in OpenVINO, on lanes that run at the same time: inputs by name -> outputs in order, valid until the lane's next call."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": lanes, "ENABLE_CPU_PINNING": False}
    compiled = ov.Core().compile_model(str(path), "CPU", settings)

    def run(request: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(request.infer(inputs, share_inputs=True, share_outputs=True).values())

    return [functools.partial(run, compiled.create_infer_request()) for _ in range(lanes)]


RUNS: dict[str, Load] = {"onnxruntime": onnxruntime_runs, "openvino": openvino_runs}
