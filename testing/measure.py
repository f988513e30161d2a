"""The measure of a result: it is no farther from the float64 reference than the reference in the result's dtype.

A small constant and a floor are granted on top; both are those of ``deltaloom.graph.distance``.
"""

from __future__ import annotations

import numpy as np

from deltaloom.graph.distance import FACTOR, FLOOR, distance
from deltaloom.graph.interpret import dtype_of
from deltaloom.graph.op import Array

__all__ = ["FACTOR", "FLOOR", "assert_close", "distance"]


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
