"""The encoder's GEMMs from library kernels: what each one is given and makes, and the files they lie in. Arithmetic only.

A layer is four GEMMs and one attention kernel. The residual stream is in half precision and never normed in memory
(export/library/epilogues.py says how its norms are taken):

    qkv     stream @ weight / rms -> queries, keys, values
    o       stream + attended @ weight -> stream, and its rows' sums of squares
    wi      gelu(stream @ gate / rms) * (stream @ up / rms), or relu(stream @ weight / rms)
    wo      stream + inner @ weight -> stream, and its rows' sums of squares

In FP8 the stream is there a second time, in 8 bits and times the next norm's weight, for the GEMMs to read; so is what wo reads, and, where
the attention kernel writes 8 bits, what o reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .gemms import StackSizes

KINDS = ("qkv", "o", "wi", "wo")
SUMMING_KINDS = ("o", "wo")  # that write the stream and the sums of its squares
FP8_LARGEST = 448.0  # of e4m3
HOPPER = "sm_90a"
# What Hopper's attention kernel is made for (serving/engines/gpu/hopper_attention.py); it alone writes e4m3.
HOPPER_ATTENTION_D_KV, HOPPER_ATTENTION_TOKENS = 64, 256
MOST_SUMS = 8  # column tiles of the stream: sums of squares a row
RUNTIME_FILE = "encoder.libcute_dsl_runtime.so"  # CuTe DSL's, which the kernels call; by its name it goes where the encoder goes
# Arrays beside the weights: float32[2 * num_layers, d_model], factors of the stream's columns before qkv and wi of each layer; and
# float32[num_layers, 4, 2], alpha and beta of each GEMM. FP8 only.
NARROW_NORMS, SCALES = "encoder_narrow_norms.npy", "encoder_scales.npy"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a GEMM is cut among the card's multiprocessors.

    Attributes:
        tile_m, tile_n: rows and columns that a block makes at a time.
        cluster_m, cluster_n: blocks that share what they read.
        pingpong: two groups of warps take turns: one multiplies while the other one's results go out. Else both multiply one tile.
        epilogue_n: columns that go out at a time; 0 = as the library chooses.
    """

    tile_m: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    pingpong: bool = False
    epilogue_n: int = 0

    def __str__(self) -> str:
        more = ("-pingpong" if self.pingpong else "") + (f"-out{self.epilogue_n}" if self.epilogue_n else "")
        return f"{self.tile_m}x{self.tile_n}-{self.cluster_m}x{self.cluster_n}{more}"

    @property
    def cluster_size(self) -> int:
        """Blocks of a cluster."""
        return self.cluster_m * self.cluster_n


@dataclasses.dataclass(frozen=True)
class EncoderKernel:
    """One compiled GEMM; takes any number of rows.

    Attributes:
        kind: one of KINDS.
        precision: of what is multiplied, "float16", "bfloat16" or "float8".
        narrow: of o and wo: also writes the stream in 8 bits, for an FP8 GEMM behind it.
    """

    kind: str
    precision: str
    tiling: Tiling
    narrow: bool = False

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return f"encoder.{self.kind}.{self.precision}{'.narrow' if self.narrow else ''}.{self.tiling}"

    @property
    def file(self) -> str:
        """The shared object."""
        return f"{self.name}.so"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EncoderKernel:
        """The inverse of dataclasses.asdict."""
        return cls(**{**fields, "tiling": Tiling(**fields["tiling"])})


def gemm_widths(stack: StackSizes, kind: str) -> tuple[int, int]:
    """Columns in and columns of the GEMM; a gated wi writes half of those."""
    inner = stack.num_heads * stack.d_kv
    return {
        "qkv": (stack.d_model, 3 * inner),
        "o": (inner, stack.d_model),
        "wi": (stack.d_model, stack.d_ff * (2 if stack.gated else 1)),
        "wo": (stack.d_ff, stack.d_model),
    }[kind]


def inner_order(architecture: str, precision: str) -> tuple[int, ...]:
    """Which channel of a block of inner channels wi's weights have at each place, so that what a thread makes lies side by side in memory.

    On Hopper a thread of wi makes every fourth channel of a row. Of 8 channels that are 2 (in half precision what it stores at once), of 16
    that are 4 (in FP8).
    """
    if architecture != HOPPER:
        return (0,)
    stored = 4 if precision == "float8" else 2
    return tuple(stored * (place % 4) + place // 4 for place in range(4 * stored))


def narrow_order(architecture: str) -> tuple[int, ...]:
    """Which channel of a block the stream has at each place in 8 bits.

    On Hopper a thread makes two channels that lie side by side, and two more eight channels on; in 8 bits it stores these four at once.
    """
    if architecture != HOPPER:
        return (0,)
    return tuple(8 * (place // 2 % 2) + 2 * (place // 4) + place % 2 for place in range(16))


def sum_tiles(stack: StackSizes, tiling: Tiling) -> int:
    """Sums of squares a row: one a column tile of the stream."""
    return -(-stack.d_model // tiling.tile_n)


def weight_file(kind: str, layer: int) -> str:
    """File of one GEMM's weights: float16, or e4m3 as uint8, [columns, columns in]; a gated wi's gate and up rows take turns."""
    return f"encoder.{layer:02d}.{kind}.library.npy"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernel multiplies calls of up to so many rows.

    Attributes:
        most_rows: 0 = any number.
    """

    most_rows: int
    kernel: EncoderKernel

    def takes(self, rows: int) -> bool:
        """Whether the kernel is for calls of so many rows."""
        return not self.most_rows or rows <= self.most_rows


@dataclasses.dataclass(frozen=True)
class EncoderLibrary:
    """The encoder's compiled GEMMs; travels in the manifest.

    Attributes:
        architecture: that they are compiled for, as CuTe DSL names it: "sm_90a".
        precision: of what is multiplied: "float16" or "float8".
        attended: of what the attention kernel writes and o reads: "float16" or "float8".
        choices: in ascending order of rows, the last of each kind and `narrow` for any number.
    """

    architecture: str
    precision: str
    attended: str
    choices: tuple[Choice, ...]

    def choose(self, kind: str, rows: int, *, narrow: bool = False) -> EncoderKernel:
        """The kernel for a call of so many rows."""
        found = (c.kernel for c in self.choices if c.kernel.kind == kind and c.kernel.narrow == narrow and c.takes(rows))
        return next(found)

    @property
    def kernels(self) -> tuple[EncoderKernel, ...]:
        """Each that is chosen for some number of rows, once."""
        return tuple(dict.fromkeys(choice.kernel for choice in self.choices))

    @property
    def compute_capability(self) -> str:
        """Of the cards that these kernels run on, as "9.0"."""
        digits = self.architecture.removeprefix("sm_").rstrip("af")
        return f"{digits[:-1]}.{digits[-1]}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EncoderLibrary:
        """The inverse of dataclasses.asdict, through JSON."""
        choices = tuple(Choice(item["most_rows"], EncoderKernel.from_dict(item["kernel"])) for item in fields["choices"])
        return cls(**{**fields, "choices": choices})
