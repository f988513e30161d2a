"""Matrix products of the NumPy backend.

``product`` is the one place that decides how a product is run; experts use it as well. What was measured (2 cores, AVX2):
one row streams weights at 32 GB/s on one thread and 43 to 47 on two; a GEMM of 16 rows or more scales 2.0 times with its
output columns cut in halves; two or three rows are faster row by row (GEMM packs the whole weight for them). ``dot`` of a row
takes 0.5 us less than ``matmul``, 5 % of a decode step of tiny-next in all. Weights
stored ``[in, out]`` were no faster on any whole model tried, and 11 % slower to decode with on next-0.3b.
"""

from __future__ import annotations

import numpy as np

from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import pool, slices
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import dtype_in

FEW_ROWS = 3
"""Rows up to which a product is a matrix-vector product for each."""

STREAM = 3 << 20
"""Weights from which one row is worth two threads (12 MiB in float32: 95 us are saved, 45 paid)."""

WORK = 1 << 23
"""Multiply-adds from which more rows are worth two threads (130 us of one core)."""

WIDE = 1024
"""Output columns a thread from which its part is cut in two."""


def product(x: Array, weight: Array, out: Array) -> None:
    """``out[rows, o] = x[rows, i] @ weight[i, o]`` on the caller's thread; ``weight`` may be a transposed view."""
    if len(x) <= FEW_ROWS:
        for row, target in zip(x, out):
            row.dot(weight, target)
    else:
        np.matmul(x, weight, out=out)


def shared_product(x: Array, weight: Array, out: Array) -> None:
    """``product`` over the threads of the pool when it is large: each takes a part of the output columns."""
    rows, (inner, columns) = len(x), weight.shape
    team = pool()
    if team.n == 1 or inner * columns * rows < (STREAM if rows <= FEW_ROWS else WORK):
        product(x, weight, out)
        return
    # Two parts a thread where they are wide: when another program takes one of the cores, the other thread does more.
    count = team.n * (2 if columns >= WIDE * team.n else 1)
    team.map(lambda part: product(x, weight[:, part], out[:, part]), slices(columns, count, 16))


def _linear(x: Array, weight: Array, bias: Array | None, out: Array | None) -> Array:
    result = np.empty((*x.shape[:-1], weight.shape[1]), x.dtype) if out is None else out
    if x.size == x.shape[-1] and weight.size < STREAM:
        x.reshape(-1).dot(weight, result.reshape(-1))
    else:
        shared_product(x.reshape(-1, x.shape[-1]), weight, result.reshape(-1, weight.shape[1]))
    if bias is not None:
        result += bias
    return result


@table.kernel("linear", when=(dtype_in("x", f32, f64), dtype_in("weight", f32, f64)), into=True)
def linear(op: Op, x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """The weight stays as typed and stored, ``[out, in]``, so that a float32 file is used where it is mapped."""
    return _linear(x, weight.T, bias, out)
