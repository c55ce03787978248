"""One of the encoder's GEMMs as CuTe DSL traces it: plain addresses and numbers in, QuACK's GEMM with our epilogue launched.

Every kernel has the same signature, so that serving calls all of them alike. Only the number of rows is not known when it is compiled.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from quack.cute_dsl_utils import get_device_capacity
from quack.epilogue.frontend import EpiMod, _pinned_visit_kind
from quack.rounding import RoundingMode
from quack.tile_scheduler import TileSchedulerOptions

from serving.contract.gemms import StackSizes
from serving.contract.library_kernels import SUMMING_KINDS, EncoderKernel, gemm_widths

from .epilogues import inner_product, normed_product, on_hopper, residual_sum

PACKED_COLUMNS = 64  # of a tile that go out at a time at least, where they go out as PackedStore
SWIZZLE = 8  # column tiles that are made side by side, so that they find each other's rows in the cache


def number_types(kernel: EncoderKernel) -> tuple[Any, Any, Any]:
    """Of what is multiplied, of `out`, and of the stream that `residual` is."""
    half = cutlass.BFloat16 if kernel.precision == "bfloat16" else cutlass.Float16
    operand = cutlass.Float8E4M3FN if kernel.precision == "float8" else half
    return operand, operand if kernel.kind == "wi" else half, half


def _units(pointer: Any) -> Any:
    """A pointer to numbers in 8 bits as one to pairs of them (PackedStore)."""
    return cute.recast_ptr(pointer, dtype=cutlass.Float16)


class EncoderGemm:
    """Traced once a kernel; see serving/contract/library_kernels.py for what each kind makes."""

    def __init__(self, stack: StackSizes, kernel: EncoderKernel):
        self.kernel = kernel
        self.columns_in, self.columns = gemm_widths(stack, kernel.kind)
        self.d_model = stack.d_model
        self.gated = stack.gated and kernel.kind == "wi"
        self.scaled = scaled = kernel.precision == "float8"
        self.packs = on_hopper()
        if kernel.kind == "qkv":
            epilogue = normed_product(stack.d_model, stack.epsilon, scaled=scaled)
        elif kernel.kind == "wi":
            epilogue = inner_product(stack.d_model, stack.epsilon, gated=self.gated, scaled=scaled)
        else:
            epilogue = residual_sum(scaled=scaled, narrow=kernel.narrow)
        self.summing = kernel.kind in SUMMING_KINDS
        self.narrow = kernel.narrow
        operand, _, _ = number_types(kernel)
        # a gated result in 8 bits is a quarter as wide as the tile, in units of 16 bits: the library's 32 columns are too few
        least = PACKED_COLUMNS if self.packs and scaled and self.gated else 0
        self.cls = _gemm_class(epilogue, kernel.tiling.epilogue_n or least)
        self.gemm = _gemm(self.cls, operand, kernel)

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        weight: cute.Pointer,
        out: cute.Pointer,
        residual: cute.Pointer,
        narrow: cute.Pointer,
        next_norm: cute.Pointer,
        squares_in: cute.Pointer,
        squares_out: cute.Pointer,
        alpha: Float32,
        beta: Float32,
        rows: Int32,
        tiles: Int32,
        clusters: Int32,
        stream: Any,
    ) -> None:
        """Enqueue the GEMM on `stream`.

        Args:
            x: [rows, columns in], of the operands' type.
            weight: [columns, columns in], likewise; gated: gate and up rows in turn.
            out: [rows, columns]; gated: half the columns; of o and wo the stream, which may not be `residual`.
            residual: o and wo: [rows, d_model], the stream before.
            narrow: o and wo, where narrow: e4m3[rows, d_model].
            next_norm: where narrow: float32[d_model], factors of the narrow stream's columns.
            squares_in: qkv and wi: float32[tiles, rows], sums of the stream's squares.
            squares_out: o and wo: the same, a tile a column tile of this kernel.
            alpha: FP8: factor of the product. beta: FP8, wi: factor of what goes out.
            rows, tiles: of `x`, of `squares_in`.
            clusters: that the card runs at once.
        """
        a = cute.make_tensor(x, cute.make_layout((rows, self.columns_in), stride=(self.columns_in, 1)))
        b = cute.make_tensor(weight, cute.make_layout((self.columns, self.columns_in), stride=(self.columns_in, 1)))
        given: dict[str, Any] = {}
        c, d = None, None
        if const_expr(self.summing):
            stream_layout = cute.make_layout((rows, self.d_model), stride=(self.d_model, 1))
            sums = (self.d_model + self.kernel.tiling.tile_n - 1) // self.kernel.tiling.tile_n
            c = cute.make_tensor(residual, stream_layout)
            d = cute.make_tensor(out, stream_layout)
            given["squares"] = cute.make_tensor(squares_out, cute.make_layout((1, rows, sums), stride=(0, 1, rows)))
            if const_expr(self.narrow):
                if const_expr(self.packs):
                    width = self.d_model // 2
                    given["narrow"] = cute.make_tensor(_units(narrow), cute.make_layout((rows, width), stride=(width, 1)))
                else:
                    given["narrow"] = cute.make_tensor(narrow, stream_layout)
                given["weight"] = cute.make_tensor(next_norm, cute.make_layout((self.d_model,), stride=(1,)))
        else:
            given["rstd"] = cute.make_tensor(squares_in, cute.make_layout((tiles, rows), stride=(rows, 1)))
            width = self.columns // 2 if const_expr(self.gated) else self.columns
            if const_expr(self.gated and self.scaled and self.packs):
                width = width // 2
                given["out"] = cute.make_tensor(_units(out), cute.make_layout((rows, width), stride=(width, 1)))
            elif const_expr(self.gated):
                given["out"] = cute.make_tensor(out, cute.make_layout((rows, width), stride=(width, 1)))
            else:
                d = cute.make_tensor(out, cute.make_layout((rows, width), stride=(width, 1)))
        if const_expr(self.scaled):
            given["alpha"] = alpha
            if const_expr(self.kernel.kind == "wi"):
                given["beta"] = beta
        scheduling = TileSchedulerOptions(max_active_clusters=clusters, raster_order=None, max_swizzle_size=Int32(SWIZZLE))
        self.gemm(a, b, d, c, self.cls.EpilogueArguments(**given), scheduling, None, stream, None, None)


def _gemm_class(epilogue: EpiMod, epilogue_n: int) -> Any:
    """QuACK's GEMM for this process's architecture with the epilogue, `epilogue_n` columns at a time."""
    operands = tuple((name, "c" if name == "c" else _pinned_visit_kind(epilogue.ops[name])) for name in epilogue.operand_names)
    paired = epilogue.mode == "acc_pair"
    minted = epilogue._mint(operands, get_device_capacity()[0], paired, False, (), RoundingMode.RN, (), False)
    if not epilogue_n:
        return minted

    class Sized(minted):  # type: ignore[valid-type, misc]
        def _compute_tile_shape_or_override(self, *given: Any, **more: Any) -> tuple[int, int]:
            tile_m, _ = super()._compute_tile_shape_or_override(*given, **more)
            return tile_m, epilogue_n

    return Sized


def _gemm(cls: Any, operand: Any, kernel: EncoderKernel) -> Any:
    """An instance for one tiling."""
    major, tiling = get_device_capacity()[0], kernel.tiling
    if major == 9:
        # fast accumulation: e4m3 products summed by the tensor core itself; promoting every partial sum to fp32 halves the speed
        made = partial(cls, pingpong=tiling.pingpong, is_persistent=True, fp8_fast_accum=True)
    elif major == 12:
        made = partial(cls, pingpong=tiling.pingpong, is_persistent=True)
    else:
        made = cls
    return made(Float32, operand, (tiling.tile_m, tiling.tile_n), (tiling.cluster_m, tiling.cluster_n, 1), gather_A=False)
