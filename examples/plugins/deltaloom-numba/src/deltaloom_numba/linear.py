"""The matrix product with a bfloat16 weight.

A few rows of x read the weight once, at the speed of the memory; more rows are a float32 product by BLAS with a tile of the weight
that was widened just before. Either way sums are in float32, and x is not rounded.
"""

from __future__ import annotations

import threading

import numpy as np

from deltaloom.backends.numpy.linear import WORK
from deltaloom.backends.numpy.threads import slices, team
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32
from deltaloom.passes.kernel import dtype_in, weights_in_bfloat16
from deltaloom_numba.loops import multiply_rows, widen
from deltaloom_numba.table import bits, shared, table

FEW_ROWS = 8
"""Rows of x, or tokens, up to which the loops are faster than BLAS with weights that are widened for it."""

TILE = 1 << 18
"""Elements of a tile: 1 MiB in float32, which the second-level cache holds."""

_own = threading.local()


@table.kernel("linear", when=(dtype_in("x", f32), weights_in_bfloat16), into=True, quantised=True)
def linear(op: Op, x: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """Threads share the rows of the weight."""
    count, width = weight.shape
    result = np.empty((*x.shape[:-1], count), np.float32) if out is None else out
    rows, target, halves = np.ascontiguousarray(x.reshape(-1, width)), result.reshape(-1, count), bits(weight)
    if len(rows) <= FEW_ROWS:
        shared(lambda start, stop: multiply_rows(rows, halves, target, start, stop), count, weight.size)
    else:
        step = tile_rows(width)
        tiles = slices(count, -(-count // step))
        team(len(rows) * weight.size >= WORK).map(lambda part: multiply_tile(rows, halves[part], target[:, part]), tiles)
    if bias is not None:
        result += bias
    return result


def tile_rows(width: int) -> int:
    """Rows of a tile of a weight of so many columns."""
    return max(1, TILE // max(1, width))


def multiply(x: Array, weight: Array, out: Array) -> None:
    """``out[rows, o] = x[rows, i] @ weight[o, i]`` on the caller's thread; all of them contiguous."""
    halves = bits(weight)
    if len(x) <= FEW_ROWS:
        multiply_rows(x, halves, out, 0, len(halves))
        return
    step = tile_rows(weight.shape[1])
    for start in range(0, len(halves), step):
        multiply_tile(x, halves[start : start + step], out[:, start : start + step])


def multiply_tile(x: Array, halves: Array, out: Array) -> None:
    """The same with a weight of at most a tile, given as its bits."""
    buffer: Array | None = getattr(_own, "tile", None)
    if buffer is None or buffer.size < halves.size:
        buffer = _own.tile = np.empty(max(TILE, halves.size), np.float32)
    wide = buffer[: halves.size].reshape(halves.shape)
    widen(halves, wide)
    np.matmul(x, wide.T, out=out)
