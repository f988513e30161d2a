"""Products with weights that are quantised, or in bfloat16, on NumPy: a tile of rows is widened into a small buffer and multiplied
while it is in the cache.

So such a weight never exists as a whole in float32; beside it there is one tile a thread. FP8, int4 and bfloat16 are widened by
moving bits, which NumPy does several times faster than casting FP8 or looking codes up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from deltaloom.backends.numpy.elementwise import swiglu_into
from deltaloom.backends.numpy.linear import product
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import slices, team
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray, copy_cast
from deltaloom.graph.types import bf16, f32, f64
from deltaloom.passes.kernel import dtype_in, some_stored_otherwise

TILE = 1 << 15
"""Codes that are widened at once (128 KiB of float32)."""

WORTH = 1 << 19
"""Codes from which a product is worth two threads (150 us of one core)."""

Multiply = Callable[[Array, Any, Array], None]
"""``multiply(x, weight, out)``: out[rows, o] = x[rows, i] @ weight[o, i]."""

_buffers = threading.local()
_F32 = np.dtype(np.float32)
_PAIR = np.dtype("<u2")
_SIGN_AND_FP8 = np.int32(-0x78100000)
"""Of an FP8 code with its sign copied to the left, shifted up by 20: the sign, then exponent and fraction."""


def multiply(x: Array, weight: Array | QuantizedArray, out: Array) -> None:
    """``out[rows, o] = x[rows, i] @ weight[o, i]`` on the caller's thread."""
    if not isinstance(weight, QuantizedArray) and weight.dtype == x.dtype:
        product(x, weight.T, out)
        return
    for start in range(0, weight.shape[0], step := tile_rows(weight)):
        _tile(x, weight, slice(start, min(start + step, weight.shape[0])), out)


def tile_rows(weight: Array | QuantizedArray) -> int:
    """Rows of a tile."""
    return max(1, TILE // weight.shape[-1])


def _tile(x: Array, weight: Array | QuantizedArray, rows: slice, out: Array) -> None:
    wide = widened(weight, rows, x.dtype)
    target = out[:, rows]
    product(x, wide.T, target)
    if isinstance(weight, QuantizedArray) and weight.form.block[1] is None:
        target *= weight.scale[rows, 0].astype(x.dtype)


def widened(weight: Array | QuantizedArray, rows: slice, dtype: np.dtype[Any]) -> Array:
    """Rows of a matrix in ``dtype``, in a buffer that the next call on this thread overwrites; times their scales, except
    where every row has one, which can multiply the result."""
    wide = _numbers(weight.data[rows] if isinstance(weight, QuantizedArray) else weight[rows], weight.shape[1])
    if dtype != np.float32:
        exact = _buffer("exact", wide.size, dtype).reshape(wide.shape)
        np.copyto(exact, wide)
        wide = exact
    if isinstance(weight, QuantizedArray) and weight.form.block[1] is not None:
        _scale_groups(wide, weight.scale, weight.form.block[0], weight.form.block[1], rows)
    return wide


def _numbers(codes: Array, width: int) -> Array:
    """The numbers of codes in float32, which holds them exactly: bfloat16, int8, FP8, or (in bytes) int4."""
    if codes.dtype == np.uint8:
        pairs = _buffer("pairs", codes.size, _PAIR).reshape(codes.shape)
        low = _buffer("low", codes.size, _PAIR).reshape(codes.shape)
        np.copyto(low, codes)
        np.left_shift(low, 8, out=pairs)
        np.left_shift(low, 4, out=low)
        np.bitwise_or(pairs, low, out=pairs)
        np.bitwise_and(pairs, 0xF0F0, out=pairs)  # the low half's code, then the high half's, each times 16
        wide = _buffer("wide", codes.size * 2, _F32).reshape(len(codes), -1)
        np.copyto(wide, pairs.view(np.int8), casting="unsafe")
        wide *= _F32.type(1 / 16)
        return wide[:, :width]
    wide = _buffer("wide", codes.size, _F32).reshape(codes.shape)
    if codes.dtype == np.int8:
        np.copyto(wide, codes, casting="unsafe")
    elif codes.dtype == bf16.numpy:
        copy_cast(codes, wide)
    elif (codes.view(np.uint8) & 0x7F).max() == 0x7F:
        np.copyto(wide, codes, casting="unsafe")  # a NaN, which has no place in the quick way
    else:
        bits = wide.view(np.int32)
        np.copyto(bits, codes.view(np.int8))
        np.left_shift(bits, 20, out=bits)
        np.bitwise_and(bits, _SIGN_AND_FP8, out=bits)
        wide *= _F32.type(2.0**120)  # the exponent's bias is 7 in FP8 and 127 in float32
    return wide


def _scale_groups(wide: Array, scales: Array, block_rows: int, group: int, rows: slice) -> None:
    own = scales[rows] if block_rows == 1 else scales[np.arange(rows.start, rows.stop) // block_rows]
    wide *= own.astype(wide.dtype).repeat(group, axis=1)[:, : wide.shape[1]]


def _buffer(use: str, size: int, dtype: np.dtype[Any]) -> Array:
    """A buffer of this thread for one use, whose dtype is always the same."""
    found: Array | None = getattr(_buffers, use, None)
    if found is None or found.size < size:
        found = np.empty(max(size, TILE), dtype)
        setattr(_buffers, use, found)
    return found[:size]


@table.kernel("linear", when=(dtype_in("x", f32, f64), some_stored_otherwise), into=True, quantised=True)
def quantised_linear(
    op: Op, x: Array, weight: Array | QuantizedArray, bias: Array | None = None, *, out: Array | None = None
) -> Array:
    """The threads share the tiles."""
    result = np.empty((*x.shape[:-1], weight.shape[0]), x.dtype) if out is None else out
    shared_multiply(x.reshape(-1, x.shape[-1]), weight, result.reshape(-1, weight.shape[0]))
    if bias is not None:
        result += bias
    return result


def shared_multiply(x: Array, weight: Array | QuantizedArray, out: Array) -> None:
    """``multiply`` over the threads of the pool when the weight is large."""
    rows = weight.shape[0]
    tiles = slices(rows, -(-rows // tile_rows(weight)))
    team(rows * weight.shape[1] >= WORTH).map(lambda part: _tile(x, weight, part, out), tiles)


@table.kernel("moe_experts", when=(dtype_in("x", f32, f64), some_stored_otherwise), into=True, quantised=True)
def quantised_moe_experts(
    op: Op,
    x: Array,
    weights: Array,
    ids: Array,
    gate_up: Array | QuantizedArray,
    down: Array | QuantizedArray,
    *,
    out: Array | None = None,
) -> Array:
    """Tokens sorted by expert, so that each expert that somebody chose is widened once; one of both weights may be plain."""
    return routed(x, weights, ids, gate_up, down, out, multiply)


def routed(
    x: Array,
    weights: Array,
    ids: Array,
    gate_up: Array | QuantizedArray,
    down: Array | QuantizedArray,
    out: Array | None,
    multiply: Multiply,
) -> Array:
    """The op ``moe_experts`` with its products done by ``multiply``, on the threads of the pool. A token sums its experts by
    ascending id."""
    hidden, k, inner = x.shape[-1], ids.shape[-1], down.shape[-1]
    rows, chosen, factors = x.reshape(-1, hidden), ids.reshape(-1, k), weights.reshape(-1, k)
    order = chosen.reshape(-1).argsort(kind="stable")
    counts = np.bincount(chosen.reshape(-1), minlength=gate_up.shape[0])
    ends = counts.cumsum()
    results = np.empty((len(order), hidden), x.dtype)

    def run(expert: int) -> None:
        own = slice(int(ends[expert] - counts[expert]), int(ends[expert]))
        both = np.empty((own.stop - own.start, 2 * inner), x.dtype)
        multiply(rows[order[own] // k], gate_up[expert], both)
        middle = np.empty((len(both), inner), x.dtype)
        swiglu_into(middle, both[:, :inner], both[:, inner:])
        multiply(middle, down[expert], results[own])

    used = np.flatnonzero(counts).tolist()
    team(3 * len(used) * inner * hidden >= WORTH).map(run, used)
    result = np.empty(x.shape, x.dtype) if out is None else out
    by_id = chosen.argsort(axis=-1, kind="stable")
    places = np.empty(len(order), np.intp)
    places[order] = np.arange(len(order))
    sums = result.reshape(rows.shape)
    sums[:] = 0
    for rank in range(k):
        column = by_id[:, rank : rank + 1]
        share = results[np.take_along_axis(places.reshape(chosen.shape), column, axis=-1)[:, 0]]
        share *= np.take_along_axis(factors, column, axis=-1)
        sums += share
    return result
