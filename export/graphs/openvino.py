"""A CPU reader's graphs for the engine and the precision that run them, and which engine is the faster here.

Comes in: exported graphs with their manifest. Goes out: the same directory with the manifest of its engine, in bf16 or int8 if asked. ONNX
Runtime and OpenVINO read the same fp32 files; both are timed on the same question where the engine is left to us. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.errors import UsageError
from export.manifest_writer import hashes, write_manifest
from serving.contract.manifest import CPU_ENGINES, MANIFEST_FILE, Manifest, cpu_name, require_bf16
from serving.contract.tensors import NUMPY_DTYPES, GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors

# The question that engines are timed on: a short one, since every passage costs a large reader a second.
PASSAGES, STEPS, ROUNDS = 4, 8, 3
# OpenVINO is chosen if it takes at most this share of ONNX Runtime's time: a difference below is noise, and not worth another package.
WORTH_IT = 0.9

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


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
    changed = dataclasses.replace(manifest, engine="openvino", precision=precision, provenance=provenance, files=files)
    return write_manifest(changed, directory)


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
    times = question_ms(directory, manifest)
    chosen = "openvino" if times["openvino"] <= WORTH_IT * times["onnxruntime"] else "onnxruntime"
    measured = {"cpu": cpu_name(), "question_ms": {engine: round(ms, 2) for engine, ms in times.items()}}
    manifest = dataclasses.replace(manifest, provenance={**manifest.provenance, "chosen_engine": measured})
    return for_openvino(directory, manifest, manifest.precision) if chosen == "openvino" else write_manifest(manifest, directory)


def question_ms(directory: Path, manifest: Manifest) -> dict[str, float]:
    """Milliseconds of a question of PASSAGES full passages and STEPS tokens, by engine: medians of ROUNDS alternating rounds."""
    length = manifest.prompt.passage_length
    lengths = {"passages": PASSAGES, "passage_length": length, "batch": 1, "past_length": 16, "encoder_sequence_length": PASSAGES * length}
    lengths |= {"questions": 1, "beams": 1}
    step_tensors = functools.partial(decoder_step_tensors, beams=True)
    graphs: dict[str, tuple[Callable[..., GraphTensors], int]] = {
        "encoder": (encoder_tensors, 1),
        "cross_kv": (cross_kv_tensors, 1),
        "decoder_step": (step_tensors, STEPS),
    }
    work: dict[str, list[tuple[Run, dict[str, np.ndarray], int]]] = {engine: [] for engine in CPU_ENGINES}
    for name, (tensors_of, times) in graphs.items():
        inputs = _plain_inputs(tensors_of(manifest.sizes), lengths)
        for engine, load in RUNS.items():
            work[engine].append((load(directory / f"{name}.onnx"), inputs, times))
    taken: dict[str, list[float]] = {engine: [] for engine in CPU_ENGINES}
    for round_ in range(ROUNDS + 1):
        for engine, runs in work.items():
            started = time.perf_counter()
            for run, inputs, times in runs:
                for _ in range(times):
                    run(inputs)
            if round_:  # the first one makes the kernels
                taken[engine].append((time.perf_counter() - started) * 1e3)
    return {engine: statistics.median(found) for engine, found in taken.items()}


def _plain_inputs(tensors: GraphTensors, lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """Ones: valid tokens, positions, lengths and features. How long a graph takes does not depend on them. Indices of rows are zeros."""
    inputs = {spec.name: np.ones(spec.shape(lengths), NUMPY_DTYPES[spec.dtype]) for spec in tensors.inputs}
    return inputs | {name: np.zeros_like(inputs[name]) for name in ("question_rows", "row_places") if name in inputs}


def onnxruntime_run(path: Path) -> Run:
    """A graph in ONNX Runtime, in fp32: inputs by name -> outputs in their order."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as it serves
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def openvino_run(path: Path) -> Run:
    """A graph in OpenVINO, in fp32: inputs by name -> outputs in their order, valid until the next call."""
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda inputs: list(request.infer(inputs, share_inputs=True, share_outputs=True).values())


RUNS = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}
