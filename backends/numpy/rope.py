"""Rotary position embedding of the NumPy backend."""

from __future__ import annotations

import numpy as np

from deltaloom.backends.numpy.table import table
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import dtype_in


@table.kernel("rope", when=(dtype_in("x", f32, f64),))
def rope(op: Op, x: Array, cos: Array, sin: Array) -> Array:
    """Rotates into the result; dimensions that do not turn are copied once."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = np.empty(x.shape, x.dtype)
    np.multiply(first, cos, out=out[..., :half])
    out[..., :half] -= second * sin
    np.multiply(second, cos, out=out[..., half : 2 * half])
    out[..., half : 2 * half] += first * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
