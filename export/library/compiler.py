"""The encoder's GEMMs compiled ahead of time by CuTe DSL, for a card that need not be here.

Comes in: a stack's sizes and what to compile. Goes out: shared objects that serving/engines/gpu/library/layers.py loads with neither torch
nor a compiler. A process compiles for one architecture: QuACK and CuTe DSL read it from the environment when they are imported, which
`compile_all` sees to. Needs quack-kernels, nvidia-cutlass-dsl, torch (any build) and a C compiler to link; no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.errors import CompileError
from serving.contract.gemms import StackSizes
from serving.contract.library_kernels import EncoderKernel

from .options import ARCHITECTURES

FUNCTION = "func"  # what an object exports
ALIGNMENT = 16  # bytes, of every array's start and row


def compile_all(stack: StackSizes, kernels: Sequence[EncoderKernel], architecture: str, directory: Path) -> dict[str, str]:
    """Compile and link kernels in processes of their own, one a core.

    Args:
        stack: the encoder's sizes; its epsilon is that of the stream as it is in half precision.
        kernels: what to compile.
        architecture: one of ARCHITECTURES.
        directory: for the shared objects.

    Returns:
        Kernel name -> error, of those that do not compile.

    Raises:
        CompileError: if the compiler cannot be started.
    """
    quack, _ = ARCHITECTURES[architecture]
    environment = os.environ | {
        "QUACK_ARCH": quack,
        "CUTE_DSL_ARCH": architecture,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))),
    }

    def compile_some(some: Sequence[EncoderKernel]) -> dict[str, str]:
        work = {"stack": dataclasses.asdict(stack), "kernels": [dataclasses.asdict(kernel) for kernel in some], "directory": str(directory)}
        command = [sys.executable, "-m", "export.library.compiler"]
        done = subprocess.run(command, input=json.dumps(work), env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{architecture}: {done.stderr.strip()[-2000:]}")
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))

    # The compiler runs on one core, and a kernel takes it 10 to 20 s.
    processes = max(1, min(len(os.sched_getaffinity(0)), len(kernels)))
    with ThreadPoolExecutor(processes) as pool:
        found = pool.map(compile_some, (kernels[first::processes] for first in range(processes)))
        return {name: error for errors in found for name, error in errors.items()}


def _compile_here(stack: StackSizes, kernel: EncoderKernel, path: Path) -> None:
    """Compile one kernel for this process's architecture to a shared object."""
    import cutlass.cute as cute
    from cutlass import Float8E4M3FN, Float32, Int32
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    from .gemm import EncoderGemm, number_types

    gemm = EncoderGemm(stack, kernel)
    operand, out, stream_type = number_types(kernel)

    def pointer(element: Any, align: int = ALIGNMENT) -> Any:
        return make_ptr(element, 0, cute.AddressSpace.gmem, assumed_align=align)

    compiled = cute.compile(
        gemm,
        pointer(operand),
        pointer(operand),
        pointer(out),
        pointer(stream_type),
        pointer(Float8E4M3FN),
        pointer(Float32),
        pointer(Float32),
        pointer(Float32),
        Float32(1),
        Float32(1),
        Int32(1),
        Int32(1),
        Int32(1),
        make_fake_stream(),
        options="--enable-tvm-ffi",
    )
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernel.o"
        compiled.export_to_c(object_file_path=str(made), function_name=FUNCTION)
        # what is undefined is in libtvm_ffi and libcute_dsl_runtime, which are loaded before it
        subprocess.run(["cc", "-shared", "-o", str(path), str(made)], check=True, capture_output=True)


def main() -> None:
    """Compile what standard input describes; the last line of standard output is name -> error."""
    work = json.load(sys.stdin)
    stack, errors = StackSizes(**work["stack"]), {}
    for fields in work["kernels"]:
        kernel = EncoderKernel.from_dict(fields)
        try:
            _compile_here(stack, kernel, Path(work["directory"]) / kernel.file)
        except Exception as error:  # a compiler's own; one kernel that fails must not hide the others
            errors[kernel.name] = f"{type(error).__name__}: {error}"[:1000]
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
