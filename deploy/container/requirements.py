"""Prints the Python packages that the readers need in NVIDIA's Triton container, one requirement per line.

Comes in: the container's CUDA version ($CUDA_VERSION), its TensorRT package (dpkg), and the pins of requirements.txt and
requirements-gpu.txt. Goes out: the same pins, with CuPy for the container's CUDA and TensorRT's Python bindings of the container's version.
Fails, with one line on standard error, rather than leave a package out. Runs in the container with its own Python, without packages.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

SERVED = ("numpy", "onnxruntime", "tokenizers")  # packages of requirements.txt that the Python models import
CUPY = re.compile(r"^cupy-cuda\d+x==(\S+)$", re.M)


def cuda_major(version: str) -> str:
    """Major version, as 12 of 12.6.2.004. Raises SystemExit if `version` is none."""
    if not re.match(r"\d+\.", version):
        raise SystemExit(f"error: CUDA_VERSION: wanted the image's CUDA version, as 12.6.2, got {version!r}")
    return version.split(".")[0]


def tensorrt_version(installed: str) -> str:
    """The version, as "10.5.0", of the TensorRT library among `package version` lines.

    Its package is named after its major version: libnvinfer10, libnvinfer11.
    """
    found = re.findall(r"^libnvinfer(\d+) (\1\.\d+\.\d+)\S*$", installed, re.M)
    if len(found) != 1:
        raise SystemExit(f"error: TensorRT: wanted one package libnvinferN, got {installed.strip()!r}; use an image with TensorRT")
    return found[0][1]


def requirements(serving: str, gpu: str, cuda_version: str, installed: str) -> list[str]:
    """The requirement lines.

    Args:
        serving: text of requirements.txt.
        gpu: text of requirements-gpu.txt.
        cuda_version: of the container.
        installed: its packages, a `package version` line each.
    """
    cuda = cuda_major(cuda_version)
    lines = [line for name in SERVED for line in re.findall(rf"^{name}==.*$", serving, re.M)]
    cupy = CUPY.findall(gpu)
    missing = [name for name in SERVED if not any(line.startswith(f"{name}==") for line in lines)] + ([] if cupy else ["cupy-cuda*x"])
    if missing:
        raise SystemExit(f"error: requirements files: wanted pins of {', '.join(missing)}, got none")
    return [*lines, f"cupy-cuda{cuda}x=={cupy[0]}", f"tensorrt-cu{cuda}=={tensorrt_version(installed)}.*"]


def main() -> None:
    """Print the requirements of this container; the argument is the directory of the requirements files."""
    directory = Path(sys.argv[1])
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}\\n", "libnvinfer[0-9]*"]
    installed = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=False).stdout
    texts = [(directory / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-gpu.txt")]
    print("\n".join(requirements(texts[0], texts[1], os.environ.get("CUDA_VERSION", ""), installed)))


if __name__ == "__main__":
    main()
