"""How far a result is from the truth, and how far it may be: no farther than the definition itself, rounded to the result's dtype.

A small constant and a floor are granted on top.
"""

from __future__ import annotations

import numpy as np

from deltaloom.graph.interpret import dtype_of
from deltaloom.graph.op import Array
from deltaloom.graph.types import DType, bf16, f16, f32, f64

FACTOR = 4.0
"""How much farther than the reference: a different order of summation and a rounding more or less."""

FLOOR: dict[DType, float] = {
    f64: 2.0**-40,  # 52 bits of mantissa, 12 of them for differences of log decays that were summed to over 1000
    f32: 2.0**-17,  # 23 bits, 6 of them for sums in another order; a chunk of the delta rule subtracts what 64 steps add
    f16: 2.0**-9,  # 10 bits, 1 of them for roundings on the way at other places
    bf16: 2.0**-6,  # 7 bits, 1 of them likewise
}
"""Error that is always allowed, relative to the largest element of the truth."""

SMALLEST_NORMAL: dict[DType, float] = {f64: 2.0**-1022, f32: 2.0**-126, f16: 2.0**-14, bf16: 2.0**-126}
MANTISSA: dict[DType, int] = {f64: 52, f32: 23, f16: 10, bf16: 7}
"""Bits of mantissa that are stored."""


def distance(result: Array, truth: Array) -> float:
    """The largest error, relative to the largest element of the truth; where that is not finite both must be equal.

    What is below the normal numbers of the result's dtype has lost its mantissa, so the smallest of these is the least
    that an error is relative to."""
    wide, exact = result.astype(np.float64), truth.astype(np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(wide[~finite], exact[~finite], equal_nan=True):
        return float("inf")
    errors = np.abs(wide[finite] - exact[finite])
    if not np.isfinite(errors).all():
        return float("inf")
    scale = float(np.abs(exact[finite]).max(initial=SMALLEST_NORMAL[dtype_of(result)]))
    return float(errors.max(initial=0.0)) / scale


def ulps(result: Array, truth: Array) -> float:
    """The largest error in units of the last place that the truth's number has in the dtype of ``result``; infinite where only one
    of the two is finite."""
    dtype = dtype_of(result)
    wide, exact = result.astype(np.float64), truth.astype(np.float64)
    same = (wide == exact) | (np.isnan(wide) & np.isnan(exact))
    if not np.isfinite(wide[~same]).all() or not np.isfinite(exact[~same]).all():
        return float("inf")
    _, exponents = np.frexp(np.maximum(np.abs(exact[~same]), SMALLEST_NORMAL[dtype]))
    errors = np.abs(wide[~same] - exact[~same])
    return float((np.ldexp(errors, MANTISSA[dtype] + 1 - exponents)).max(initial=0.0))
