"""The measure of a result: it is no farther from the float64 reference than the reference in the result's dtype.

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


def assert_close(name: str, result: Array, truth: Array, rounded: Array, *, depth: int = 1) -> None:
    """``AssertionError`` unless ``result`` is close enough to ``truth`` (float64); ``rounded`` is the reference in the
    dtype of the result. Integers and booleans must be equal. The floor is granted ``depth`` times, for results of so many layers,
    each of which rounds at places of its own."""
    assert result.shape == truth.shape, f"{name} has shape {result.shape}, expected {truth.shape}"
    assert result.dtype == rounded.dtype, f"{name} has dtype {result.dtype}, expected {rounded.dtype}"
    if result.dtype.kind in "iub":
        assert np.array_equal(result, truth), f"{name} differs in {np.sum(result != truth)} of {truth.size} elements"
        return
    if not np.isfinite(rounded.astype(np.float64)).all():
        return  # the definition itself overflows in this dtype, so there is nothing to compare with
    allowed = FACTOR * distance(rounded, truth) + depth * FLOOR[dtype_of(result)]
    found = distance(result, truth)
    assert found <= allowed, f"{name} is {found:.3g} from the float64 reference, allowed are {allowed:.3g}"
