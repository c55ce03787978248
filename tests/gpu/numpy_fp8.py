"""E4m3 in NumPy, which has no such type: bytes to numbers and back."""

from __future__ import annotations

import numpy as np


def _magnitudes() -> np.ndarray:
    """float32[127], of bytes 0 to 126; byte 127 is not a number."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6).astype(np.float32)


MAGNITUDES = _magnitudes()


def numbers(narrow: np.ndarray) -> np.ndarray:
    """uint8 -> float32."""
    table = np.concatenate([MAGNITUDES, [np.nan], -MAGNITUDES, [np.nan]]).astype(np.float32)
    return table[narrow]


def narrowed(wide: np.ndarray) -> np.ndarray:
    """Float -> uint8, the nearest; beyond the largest the largest."""
    between = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    return (np.searchsorted(between, np.abs(wide)) + 128 * np.signbit(wide)).astype(np.uint8)
