"""Readers for the GPU tests: engines under build/demo/engines, the graphs that they were built from, and fp32 engines for the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.engines.cpu import OnnxEncoder

ENGINES = Path(os.environ.get("GPU_ENGINES", "build/demo/engines"))
GRAPHS = Path(os.environ.get("GPU_GRAPHS", "build/demo/engines"))
CPU_ENGINES = Path(os.environ.get("CPU_ENGINES", "build/cpu_engines"))
HELDOUT = Path("build/corpus/heldout.jsonl")


@dataclasses.dataclass(frozen=True)
class GpuReader:
    """One reader in three forms.

    Attributes:
        graphs: half-precision ONNX that the engines were built from.
        cpu: fp32 engines for ONNX Runtime.
        states: fp32 hidden states of some held-out questions, packed, with the position of each token in the padded sequence.
    """

    name: str
    engines: Path
    graphs: Path
    cpu: Path
    manifest: Manifest
    cpu_manifest: Manifest
    limits: Limits
    inputs: list[tuple[np.ndarray, np.ndarray]]
    states: list[tuple[np.ndarray, np.ndarray]]


def limits_of(engines: Path) -> Limits:
    """Limits that the engines cover."""
    built = Manifest.load(engines)
    if built.build is None:  # ONNX Runtime takes any shape
        return Limits(slots=8)
    if built.is_whole:
        return Limits(slots=max(profile["positions"][2][0] for profile in built.build.profiles["decoder_step.plan"]))
    profiles = built.build.profiles["decoder.qkv.plan"]
    return Limits(slots=max(profile["x"][2][-2] for profile in profiles))


@pytest.fixture(scope="session", params=["fid", "fido"])
def gpu_reader(request: pytest.FixtureRequest) -> GpuReader:
    from tokenizers import Tokenizer

    from serving.pipeline.prompt import PromptEncoder

    name = request.param
    engines, cpu = ENGINES / name, CPU_ENGINES / name
    manifest, cpu_manifest = Manifest.load(engines), Manifest.load(cpu)
    assert manifest.weights_sha256 == cpu_manifest.weights_sha256
    prompt = PromptEncoder(Tokenizer.from_file(str(cpu / "tokenizer.json")), cpu_manifest)
    encoder = OnnxEncoder(cpu, cpu_manifest)
    inputs, states = [], []
    with HELDOUT.open(encoding="utf-8") as lines:
        for line, passages in zip(lines, (10, 3, 10, 1, 7, 10, 5, 10), strict=False):
            example = json.loads(line)
            contexts = example["ctxs"][:passages]
            tokens = prompt.encode(example["question"], [c["text"] for c in contexts], [c["title"] for c in contexts])
            (hidden,) = encoder.encode([(tokens.input_ids, tokens.attention_mask)])
            inputs.append((tokens.input_ids, tokens.attention_mask))
            states.append((hidden[tokens.attention_mask.astype(bool)], tokens.encoder_positions))
    return GpuReader(name, engines, GRAPHS / f"{name}.graphs", cpu, manifest, cpu_manifest, limits_of(engines), inputs, states)
