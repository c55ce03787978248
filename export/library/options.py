"""What to make of the encoder's GEMMs: library kernels for an architecture, or engines. Imports nothing but the standard library."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from export.tensorrt.detect import cuda_gpu

# Architectures that QuACK 0.6.5 has a GEMM for (its sm_80 raises NotImplementedError): CuTe DSL's name -> (QuACK's, precisions).
ARCHITECTURES = {
    "sm_90a": ("90", ("float16", "bfloat16", "float8")),
    "sm_100a": ("100", ("float16", "bfloat16", "float8")),
    "sm_120a": ("120", ("float16", "bfloat16", "float8")),
}
MEASURED = {"9.0": "sm_90a"}  # compute capability -> architecture, where library kernels were measured to be faster than engines
ENGINES, AUTO = "none", "auto"
LIBRARY_PRECISIONS = CROSS_KV_PRECISIONS = ("float16", "float8")


@dataclasses.dataclass(frozen=True)
class LibraryOptions:
    """How the encoder's GEMMs are made for a GPU, and what is in FP8.

    Attributes:
        architecture: one of ARCHITECTURES; "none" for engines; "auto" for this machine's GPU where library kernels were measured to be
            faster and can be compiled, else engines.
        precision: of the kernels, one of LIBRARY_PRECISIONS.
        samples: questions and passages, a line of JSON each, that FP8's scales are measured on; None = random tokens.
        cross_kv: of cross-attention's keys and values, one of CROSS_KV_PRECISIONS; None = float8 beside library kernels in float8, if the
            reader has a key/value head for each head.
    """

    architecture: str = ENGINES
    precision: str = LIBRARY_PRECISIONS[0]
    samples: Path | None = None
    cross_kv: str | None = None

    @property
    def compiles(self) -> bool:
        """Whether the encoder's GEMMs are library kernels, of what `resolved` gives."""
        return self.architecture != ENGINES

    def resolved(self) -> LibraryOptions:
        """With an architecture, or "none" for engines."""
        architecture = self.architecture
        if architecture == AUTO:
            gpu = cuda_gpu() if importlib.util.find_spec("quack") is not None else None
            architecture = ENGINES if gpu is None else MEASURED.get(gpu.compute_capability, ENGINES)
        return dataclasses.replace(self, architecture=architecture)
