"""Packages of the container: TensorRT's package is found whatever its major version, and CuPy fits the container's CUDA."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "container" / "requirements.py"
container = types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))
SERVING, GPU = ((ROOT / name).read_text() for name in ("requirements.txt", "requirements-gpu.txt"))


@pytest.mark.parametrize(
    ("cuda", "installed", "wanted"),
    [
        (
            "12.6.2.004",
            "libnvinfer10 10.5.0.18-1+cuda12.6\nlibnvinfer-bin 10.5.0.18-1+cuda12.6\n",
            ["cupy-cuda12x", "tensorrt-cu12==10.5.0.*"],
        ),
        ("13.1.0", "libnvinfer11 11.0.1.5-1+cuda13.1\nlibnvinfer-dev 11.0.1.5-1+cuda13.1\n", ["cupy-cuda13x", "tensorrt-cu13==11.0.1.*"]),
    ],
)
def test_the_container_decides_which_cupy_and_tensorrt(cuda: str, installed: str, wanted: list[str]):
    found = container.requirements(SERVING, GPU, cuda, installed)
    cupy = next(line for line in found if line.startswith("cupy"))
    assert cupy.split("==")[0] == wanted[0] and found[-1] == wanted[1]
    assert cupy.split("==")[1] in GPU  # the version that requirements-gpu.txt pins
    assert any(line.startswith("numpy==1.26.4") for line in found) and any(line.startswith("tokenizers==") for line in found)
    assert len([line for line in found if line.startswith("onnxruntime==")]) == SERVING.count("\nonnxruntime==")


@pytest.mark.parametrize(
    ("cuda", "installed", "message"),
    [
        ("", "libnvinfer10 10.5.0.18-1\n", "CUDA_VERSION: wanted the image's CUDA version"),
        ("12.6.2", "", "TensorRT: wanted one package libnvinferN, got ''"),
        ("12.6.2", "libnvinfer10 10.5.0.18-1\nlibnvinfer11 11.0.1.5-1\n", "TensorRT: wanted one package"),
        ("12.6.2", "libnvinfer-bin 10.5.0.18-1\n", "TensorRT: wanted one package"),
    ],
)
def test_what_cannot_be_told_fails_loudly(cuda: str, installed: str, message: str):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        container.requirements(SERVING, GPU, cuda, installed)


def test_a_missing_pin_fails_loudly():
    with pytest.raises(SystemExit, match=r"wanted pins of tokenizers, cupy-cuda\*x, got none"):
        container.requirements("numpy==1.26.4\nonnxruntime==1.23.2\n", "", "12.6.2", "libnvinfer10 10.5.0.18-1\n")


def test_the_command_asks_dpkg(tmp_path: Path):
    dpkg = tmp_path / "dpkg-query"
    dpkg.write_text('#!/bin/sh\necho "libnvinfer11 11.0.1.5-1+cuda13.1"\n')
    dpkg.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VERSION": "13.1.0"}
    done = subprocess.run([sys.executable, SCRIPT, ROOT], env=env, capture_output=True, text=True, check=True)
    assert "tensorrt-cu13==11.0.1.*" in done.stdout.splitlines()
    failed = subprocess.run([sys.executable, SCRIPT, ROOT], env={**env, "CUDA_VERSION": ""}, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: CUDA_VERSION") and not failed.stdout
