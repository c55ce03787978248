"""What the encoder's GEMMs do to a tile on its way out, as epilogues of QuACK's GEMMs.

The residual stream is never normed in memory: a GEMM that writes it also writes the sum of squares of every row, tile by tile, and the GEMM
that reads it multiplies its rows by 1 / rms. The norm's weight is in that GEMM's weight (half precision) or in the 8-bit copy of the stream
(FP8). So a layer is four GEMMs and one attention kernel, and nothing between them.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Float16, Float32, Int32, const_expr
from quack.activation import relu
from quack.cute_dsl_utils import get_device_capacity
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.math import unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad, Scalar, TileStore

from serving.contract.library_kernels import MOST_SUMS

GELU_LINEAR, GELU_CUBIC = 0.7978845608028654, 0.7978845608028654 * 0.044715  # sqrt(2 / pi)


class RowScale(ColVecLoad):
    """1 / rms of each row, from the sums of squares that the GEMM before wrote, times a factor.

    Args:
        name: of the operand, a float32[columns tiles, rows] tensor, rows innermost.
        d_model: of the residual stream.
        epsilon: of the norm.
    """

    def __init__(self, name: str, d_model: int, epsilon: float):
        super().__init__(name)
        self.d_model, self.epsilon = d_model, epsilon

    def config_key(self) -> tuple[int, float]:
        """What tells kernels with this operand apart."""
        return (self.d_model, self.epsilon)

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        """Every thread makes the factors of some rows of the tile; the driver's barrier after this lets all read them."""
        first = ctx.tile_coord_mnkl[0] * ctx.tile_M
        tiles, last_row = cute.size(param, mode=[0]), cute.size(param, mode=[1]) - 1
        for i in cutlass.range_constexpr((ctx.tile_M + ctx.num_epi_threads - 1) // ctx.num_epi_threads):
            row = ctx.tidx + i * ctx.num_epi_threads
            if row < ctx.tile_M:
                # all are asked for before the first is added: the sums come from the L2 cache, and the epilogue waits for them
                at = min(first + row, last_row)
                found = [param[min(Int32(tile), tiles - 1), at] for tile in range(MOST_SUMS)]
                squares = Float32(0.0)
                for tile in cutlass.range_constexpr(MOST_SUMS):
                    squares += found[tile] if tile < tiles else Float32(0.0)
                smem_tensor[row] = cute.math.rsqrt(squares * Float32(1.0 / self.d_model) + Float32(self.epsilon), fastmath=True)
        tile = ctx.partition_for_epilogue_fn(
            cute.make_tensor(smem_tensor.iterator, cute.make_layout((ctx.tile_M, ctx.tile_N), stride=self._broadcast_stride()))
        )
        if const_expr(ctx.tiled_copy_t2r is not None):
            tile = ctx.tiled_copy_r2s.retile(tile)
        subtile = cute.group_modes(tile, 3, cute.rank(tile))[None, None, None, 0]
        return [tile, cute.make_rmem_tensor(subtile.layout, gemm.acc_dtype)]


class OrderedGated(TileStore):
    """A gated output in half precision on Hopper, of weights in `inner_order`: what a thread stores, it has already."""

    @cute.jit
    def store_convert(self, gemm: Any, values: Any, *_: Any) -> Any:
        """A subtile's values, which lie row half by row half and then channel by channel, as pairs of channels by row halves."""
        ordered = cute.make_rmem_tensor(values.layout.shape, Float32)
        for i in cutlass.range_constexpr(cute.size(values)):
            half, channel = i % 2, i // 2
            ordered[channel % 2 + 2 * half + 4 * (channel // 2)] = values[i]
        return ordered.to(getattr(gemm, self._dtype_gemm_attr()))


class PackedStore(TileStore):
    """An output in e4m3 on Hopper, four numbers of a thread at once: a tensor of 16-bit units, each two numbers.

    gated: of weights in `inner_order`; else its columns are in `narrow_order`.
    """

    def __init__(self, name: str, *, gated: bool = False):
        super().__init__(name, epi_tile_fn=_quarter_tile if gated else _half_tile, gated=gated)

    def to_params(self, gemm: Any, args: Any) -> dict[str, Any]:
        """As the base class, where the instruction for 16-bit matrices fits: it stores 16 units of a row."""
        _, units = self.epi_tile_fn(gemm, gemm.epi_tile)
        if units % 16:
            raise ValueError(f"{self.name}: columns that go out at a time: wanted whole 16 units, got {units}")
        return dict(super().to_params(gemm, args))

    def store_setup(
        self,
        gemm: Any,
        params: Any,
        smem_tensor: Any,
        tiled_copy_r2s: Any,
        tiled_copy_t2r: Any,
        tile_coord_mnkl: Any,
        varlen_manager: Any,
        tidx: Any,
    ) -> tuple[Any, Any, Any, None]:
        """As the base class, for units."""
        copy = self._make_tiled_copy_r2s(gemm, params, tiled_copy_r2s, tiled_copy_t2r)
        tile_m, tile_n = gemm.cta_tile_shape_mnk[:2]
        store, _, _ = gemm.epilog_gmem_copy_and_partition(
            getattr(params, self._tma_atom_key()),
            varlen_manager.offset_batch_epi(getattr(params, self.name), tile_coord_mnkl[3]),
            (tile_m, tile_n // (4 if self.gated else 2)),
            getattr(params, self._epi_tile_key()),
            smem_tensor,
            tile_coord_mnkl,
        )
        return copy, copy.get_slice(tidx).partition_D(smem_tensor), store, None

    @cute.jit
    def store_convert(self, gemm: Any, values: Any, *_: Any) -> Any:
        """A subtile's values, in fours by row halves, as units."""
        count = const_expr(cute.size(values))
        ordered = cute.make_rmem_tensor(count, Float32)
        for i in cutlass.range_constexpr(count):
            if const_expr(self.gated):  # row half by row half, then channel by channel
                half, channel = i % 2, i // 2
                place, four = channel % 4, channel // 4
            else:  # two channels, row half by row half, then eight channels on
                half = i // 2 % 2
                place, four = i % 2 + 2 * (i // 4 % 2), i // 8
            ordered[place + 4 * half + 8 * four] = values[i]
        return cute.recast_tensor(ordered.to(Float8E4M3FN), Float16)

    @cute.jit
    def store_r2s(self, gemm: Any, tiled_copy: Any, units: Any, smem_stage: Any, tidx: Any) -> None:
        """To shared memory, by the instruction for 16-bit matrices."""
        cute.copy(tiled_copy, cute.make_tensor(units.iterator, cute.make_layout(smem_stage.shape)), smem_stage)


def _half_tile(gemm: Any, tile: Any) -> Any:
    return tile[0], tile[1] // 2


def _quarter_tile(gemm: Any, tile: Any) -> Any:
    return tile[0], tile[1] // 4


def on_hopper() -> bool:
    """Whether this process compiles for it."""
    return bool(get_device_capacity()[0] == 9)


def gated_gelu(gate: Any, up: Any, factor: Any, factor_up: Any) -> Any:
    """2 * gelu(gate * factor) * up * factor_up, gelu in its tanh form.

    Of every number of a tile; what is made of the factors alone is made once a row. So a pair costs six multiplications and a tanh.
    """
    angle = gate * (gate * gate * (factor * factor * factor * GELU_CUBIC) + factor * GELU_LINEAR)
    return (gate * cute.math.tanh(angle, fastmath=True) + gate) * (up * (factor * factor_up))


def normed_product(d_model: int, epsilon: float, *, scaled: bool) -> EpiMod:
    """Queries, keys and values: D = acc / rms (* alpha, the scales of FP8 operands)."""
    ops = {"rstd": RowScale("rstd", d_model, epsilon)}
    if not scaled:

        @gemm_epilogue(ops=ops)
        def normed(acc, rstd):  # type: ignore[no-untyped-def]
            return {"D": acc * rstd}

        return normed

    @gemm_epilogue(ops={**ops, "alpha": Scalar("alpha")})
    def normed_scaled(acc, rstd, alpha):  # type: ignore[no-untyped-def]
        return {"D": acc * (rstd * alpha)}

    return normed_scaled


def inner_product(d_model: int, epsilon: float, *, gated: bool, scaled: bool) -> EpiMod:
    """The first GEMM of the feed-forward layer with its activation.

    gated: columns come in pairs, gate and up, out = gelu(gate) * up; else out = relu. Of FP8 operands `alpha` holds the scales, `beta`
    the factor that brings the result into e4m3's range.
    """
    ops: dict[str, Any] = {"rstd": RowScale("rstd", d_model, epsilon)}
    if scaled:
        ops |= {"alpha": Scalar("alpha"), "beta": Scalar("beta")}
    if on_hopper():
        out = PackedStore("out", gated=True) if scaled else OrderedGated("out", gated=True)
    else:
        out = TileStore("out", gated=True)
    if gated and scaled:

        @gemm_epilogue(outputs=(out,), ops=ops, mode="acc_pair")
        def gated_scaled(acc, rstd, alpha, beta):  # type: ignore[no-untyped-def]
            gate, up = unpack(acc)
            factor = rstd * alpha
            return {"out": gated_gelu(gate, up, factor, factor * (beta * 0.5))}

        return gated_scaled
    if gated:

        @gemm_epilogue(outputs=(out,), ops=ops, mode="acc_pair")
        def gated_plain(acc, rstd):  # type: ignore[no-untyped-def]
            gate, up = unpack(acc)
            return {"out": gated_gelu(gate, up, rstd, rstd * 0.5)}

        return gated_plain
    if scaled:

        @gemm_epilogue(ops=ops)
        def relu_scaled(acc, rstd, alpha, beta):  # type: ignore[no-untyped-def]
            return {"D": relu(acc * (rstd * alpha * beta))}  # beta is positive

        return relu_scaled

    @gemm_epilogue(ops=ops)
    def relu_plain(acc, rstd):  # type: ignore[no-untyped-def]
        return {"D": relu(acc * rstd)}

    return relu_plain


def residual_sum(*, scaled: bool, narrow: bool) -> EpiMod:
    """What is added to the residual stream: D, the stream with it, and the sums of squares of its rows.

    scaled: `alpha` holds the scales of FP8 operands. narrow: the stream a second time in 8 bits, times the next norm's weight and scale.
    """
    sums = {"squares": ColVecReduce("squares", scaled=True)}
    alpha = {"alpha": Scalar("alpha")} if scaled else {}
    copy = (PackedStore("narrow") if on_hopper() else TileStore("narrow"),) if narrow else ()
    weight = {"weight": RowVecLoad("weight")} if narrow else {}
    if narrow and scaled:

        @gemm_epilogue(outputs=copy, ops={**weight, **alpha}, reduces=sums)
        def added_narrow_scaled(acc, c, weight, alpha):  # type: ignore[no-untyped-def]
            x = acc * alpha + c
            return {"D": x, "narrow": x * weight, "squares": (x, x)}

        return added_narrow_scaled
    if narrow:

        @gemm_epilogue(outputs=copy, ops=weight, reduces=sums)
        def added_narrow(acc, c, weight):  # type: ignore[no-untyped-def]
            x = acc + c
            return {"D": x, "narrow": x * weight, "squares": (x, x)}

        return added_narrow
    if scaled:

        @gemm_epilogue(ops=alpha, reduces=sums)
        def added_scaled(acc, c, alpha):  # type: ignore[no-untyped-def]
            x = acc * alpha + c
            return {"D": x, "squares": (x, x)}

        return added_scaled

    @gemm_epilogue(reduces=sums)
    def added(acc, c):  # type: ignore[no-untyped-def]
        x = acc + c
        return {"D": x, "squares": (x, x)}

    return added
