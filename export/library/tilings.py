"""Tilings of the encoder's GEMMs: what was the fastest on a card of each architecture, or what is known to run there."""

from __future__ import annotations

from serving.contract.library_kernels import Tiling

Usual = tuple[tuple[int, Tiling], ...]  # rows up to, 0 for any number; in ascending order
SAFE: dict[str, Tiling] = {
    "sm_90a": Tiling(128, 128, 1, 2, pingpong=True, epilogue_n=64),
    "sm_100a": Tiling(128, 128),
    "sm_120a": Tiling(128, 128, pingpong=True),
}


def _turns(tile_m: int, tile_n: int, cluster_m: int, cluster_n: int, epilogue_n: int = 0) -> Tiling:
    return Tiling(tile_m, tile_n, cluster_m, cluster_n, pingpong=True, epilogue_n=epilogue_n)


# Measured on H100s at base size, at 256, 2,560, 10,240, 30,720 and 245,760 rows, among up to 22 tilings each, all in turns (medians of 7 to
# 11). Tiles of 256 rows, which two groups of warps share, were 10 to 30% slower throughout: no results go out while they multiply.
FASTEST: dict[tuple[str, str, str], Usual] = {
    ("sm_90a", "qkv", "float16"): ((0, _turns(128, 192, 1, 2, 64)),),
    ("sm_90a", "o", "float16"): ((5_120, _turns(128, 128, 1, 2, 64)), (0, _turns(128, 192, 2, 1, 64))),
    ("sm_90a", "wi", "float16"): ((1_024, _turns(128, 128, 1, 2, 64)), (0, _turns(192, 128, 1, 2, 64))),
    ("sm_90a", "wo", "float16"): (
        (20_480, _turns(128, 128, 1, 2, 64)),
        (61_440, _turns(128, 128, 1, 2)),
        (0, _turns(128, 192, 1, 2)),
    ),
    ("sm_90a", "qkv", "float8"): ((0, _turns(128, 192, 1, 2, 64)),),
    ("sm_90a", "o", "float8"): ((0, _turns(128, 128, 1, 2, 64)),),
    ("sm_90a", "wi", "float8"): ((5_120, _turns(128, 128, 1, 2, 128)), (0, _turns(128, 192, 2, 1, 64))),
    ("sm_90a", "wo", "float8"): (
        (5_120, _turns(128, 128, 1, 2, 64)),
        (61_440, _turns(128, 128, 1, 2)),
        (0, _turns(128, 192, 1, 2)),
    ),
}


def usual_tilings(architecture: str, kind: str, precision: str) -> Usual:
    """Of a GEMM, by rows. Both half precisions have the same."""
    measured = "float16" if precision == "bfloat16" else precision
    return FASTEST.get((architecture, kind, measured), ((0, SAFE[architecture]),))
