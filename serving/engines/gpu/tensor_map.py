"""Maps of matrices on the GPU for Hopper's copy engine, which CuPy has no interface for."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import cupy as cp
import numpy as np

MAP_BYTES, MAP_ALIGNMENT = 128, 64
# Of CUDA's driver interface: CUtensorMapDataType (it means 16 bits and no more), -Interleave, -Swizzle, -L2promotion, -FloatOOBfill.
FLOAT16, NOT_INTERLEAVED, SWIZZLE_128, L2_128, ZEROS = 6, 0, 3, 2, 0


class TensorMapError(RuntimeError):
    """The driver refused to make a map."""


def rows_behind(matrix: cp.ndarray) -> int:
    """Rows of a contiguous matrix and of what lies behind it in the same allocation: as many as can be read at its address."""
    memory = matrix.data.mem
    return int((memory.ptr + memory.size - matrix.data.ptr) // (matrix.shape[1] * matrix.itemsize))


def tensor_map(address: int, rows: int, columns: int, box_rows: int, box_columns: int) -> np.ndarray:
    """A map of a contiguous matrix of 16-bit elements, of which boxes are copied into shared memory, swizzled by 128 bytes.

    Args:
        address: of the matrix, a multiple of 16.
        rows: of it; a box beyond them reads zeros.
        columns: of it.
        box_rows: at most 256.
        box_columns: 64, as many as the swizzle has room for.

    Returns:
        uint8[MAP_BYTES].

    Raises:
        TensorMapError: if the driver refuses.
    """
    room = np.zeros(MAP_BYTES + MAP_ALIGNMENT, np.uint8)
    made = room[-room.ctypes.data % MAP_ALIGNMENT :][:MAP_BYTES]
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2)
    box, steps = (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    matrix = (FLOAT16, 2, ctypes.c_void_p(address), sizes, strides, box, steps)
    code = _library().cuTensorMapEncodeTiled(ctypes.c_void_p(made.ctypes.data), *matrix, NOT_INTERLEAVED, SWIZZLE_128, L2_128, ZEROS)
    if code:
        raise TensorMapError(f"cuTensorMapEncodeTiled: CUDA driver error {code} for {rows} rows of {columns} at {address:#x}")
    return made.copy()


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")
