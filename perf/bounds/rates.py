"""`python -m perf.bounds.rates`: the measured rates of this machine and its description: machine.json of a run.

Two rates bound everything that perf/bounds/cost.py counts: of a large copy, counting bytes read and written, and of a large GEMM in the
engines' precision. CuPy runs them on a GPU, PyTorch on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cost import HardwareSpec
from .machine import describe
from .statistics import spread

ROUNDS = 5
CPU_COPY_BYTES, CPU_GEMM = 1 << 29, 4096
GPU_COPY_BYTES, GPU_GEMM = 1 << 32, 8192


def cpu_rates() -> dict[str, Any]:
    """Copy and fp32 GEMM by PyTorch on all cores."""
    import torch

    torch.manual_seed(0)
    source = torch.ones(CPU_COPY_BYTES // 4)
    target = torch.empty_like(source)
    left, right = torch.randn(CPU_GEMM, CPU_GEMM), torch.randn(CPU_GEMM, CPU_GEMM)
    copies = _seconds(lambda: target.copy_(source))
    gemms = _seconds(lambda: torch.matmul(left, right))
    return _rates(copies, CPU_COPY_BYTES, gemms, CPU_GEMM) | {"gpu": None, "precision": "float32"}


def gpu_rates() -> dict[str, Any]:
    """Copy and fp16 GEMM on the current CUDA device."""
    import cupy as cp

    source = cp.ones(GPU_COPY_BYTES // 4, cp.float32)
    target = cp.empty_like(source)
    left, right = (cp.random.standard_normal((GPU_GEMM, GPU_GEMM), dtype=cp.float32).astype(cp.float16) for _ in range(2))

    def finished(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(4):  # several, to hide the launch
                work()
            cp.cuda.Device().synchronize()

        return run

    copies = _seconds(finished(lambda: cp.copyto(target, source)))
    gemms = _seconds(finished(lambda: cp.matmul(left, right)))
    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    found = _rates([s / 4 for s in copies], GPU_COPY_BYTES, [s / 4 for s in gemms], GPU_GEMM)
    return found | {"gpu": properties["name"].decode(), "precision": "float16"}


def _seconds(work: Callable[[], object]) -> list[float]:
    work()
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return found


def _rates(copies: list[float], copy_bytes: int, gemms: list[float], size: int) -> dict[str, Any]:
    return {
        "copy_tb_per_s": spread([2 * copy_bytes / s / 1e12 for s in copies], 5),
        "peak_tflops": spread([2 * size**3 / s / 1e12 for s in gemms], 4),
    }


def hardware_spec_of(run: Path) -> HardwareSpec:
    """The rates of a run's machine.json.

    Raises:
        FileNotFoundError: if `python -m perf.bounds.rates` has not run yet.
    """
    machine = json.loads((run / "machine.json").read_text(encoding="utf-8"))
    name = machine["gpu"] or machine["processor"]
    return HardwareSpec(name, machine["peak_tflops"]["median"] * 1e12, machine["copy_tb_per_s"]["median"] * 1e12)


def main(argv: list[str] | None = None) -> int:
    """Measure and write machine.json."""
    parser = argparse.ArgumentParser(prog="python -m perf.bounds.rates", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--run", type=Path, default=Path("build/perf"))
    arguments = parser.parse_args(argv)
    found = describe() | (gpu_rates() if arguments.device == "gpu" else cpu_rates())
    arguments.run.mkdir(parents=True, exist_ok=True)
    (arguments.run / "machine.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rates = f"{found['copy_tb_per_s']['median'] * 1e3:.1f} GB/s, {found['peak_tflops']['median']:.2f} TFLOP/s"
    print(f"{found['gpu'] or found['processor']}: {rates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
