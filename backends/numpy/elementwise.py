"""Element-wise ops of the NumPy backend.

``1 / (1 + exp(-x))`` is 0 where exp(-x) overflows, which is right; programs run with NumPy's warning of overflow off.
Clamping x first would cost a call an activation, 2 % of a decode step of tiny-next. Large arrays go through row blocks that stay
in the second-level cache: five passes over fresh 8 MB temporaries cost more in page faults than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import numpy as np

from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import pool
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import dtype_in

ONE = np.float32(1)
"""A scalar of NumPy's own, which spares each call the conversion of a Python number; float64 arrays stay float64 with it."""

BLOCK = 1 << 15
"""Elements of a block: with two or three operands it stays within 512 KiB."""


def one_plus_exp_negative(x: Array, out: Array | None = None) -> Array:
    """``1 + exp(-x)``; ``out`` may be x."""
    result: Array = np.negative(x, out)
    np.exp(result, result)
    return np.add(result, ONE, result)


def logistic(x: Array) -> Array:
    result = one_plus_exp_negative(x)
    return np.divide(1, result, out=result)


def by_rows(run: Callable[..., None], out: Array, *inputs: Array) -> Array:
    """``run(out, *inputs)``, cut into blocks along the flattened leading axes when ``out`` is large; every array has the leading
    axes of ``out``. Returns ``out``."""
    if out.size <= 2 * BLOCK or out.ndim < 2:
        run(out, *inputs)
        return out
    rows = out.size // out.shape[-1]
    flat = [array.reshape(rows, array.shape[-1]) for array in (out, *inputs)]
    step = max(1, BLOCK // out.shape[-1])
    pool().map(lambda at: run(*(array[at : at + step] for array in flat)), range(0, rows, step))
    return out


def swiglu_into(out: Array, gate: Array, up: Array) -> None:
    """``silu(gate) * up`` without a temporary; ``out`` is another array than both."""
    silu_into(out, gate)
    out *= up


def silu_into(out: Array, x: Array) -> None:
    """``x / (1 + exp(-x))`` without a temporary; ``out`` is another array than x."""
    np.divide(x, one_plus_exp_negative(x, out), out=out)


def sigmoid_gate_into(out: Array, x: Array, gate: Array) -> None:
    """``x * sigmoid(gate)``; ``out`` may be x."""
    np.divide(x, one_plus_exp_negative(gate), out=out)


def _logistic_into(out: Array, x: Array) -> None:
    np.divide(1, one_plus_exp_negative(x, out), out=out)


FLOAT = dtype_in("x", f32, f64)


@table.kernel("sigmoid", when=(FLOAT,))
def sigmoid(op: Op, x: Array) -> Array:
    """No overflow, in blocks."""
    return by_rows(_logistic_into, np.empty(x.shape, x.dtype), x)


@table.kernel("silu", when=(FLOAT,))
def silu(op: Op, x: Array) -> Array:
    """No overflow, in blocks."""
    return by_rows(silu_into, np.empty(x.shape, x.dtype), x)


@table.kernel("swiglu", when=(dtype_in("gate", f32, f64),))
def swiglu(op: Op, gate: Array, up: Array) -> Array:
    """No overflow, in blocks; one temporary."""
    return by_rows(swiglu_into, np.empty(gate.shape, gate.dtype), gate, up)


@table.kernel("packed_swiglu", when=(dtype_in("both", f32, f64),), into=True)
def packed_swiglu(op: Op, both: Array, *, out: Array | None = None) -> Array:
    """The halves are views."""
    width = both.shape[-1] // 2
    result = np.empty((*both.shape[:-1], width), both.dtype) if out is None else out

    def run(result: Array, both: Array) -> None:
        swiglu_into(result, both[..., :width], both[..., width:])

    return by_rows(run, result, both)


@table.kernel("sigmoid_gate", when=(FLOAT,))
def sigmoid_gate(op: Op, x: Array, gate: Array) -> Array:
    """One division instead of a division and a product; one gate for all, as the shared expert has, is a plain number."""
    if gate.size == 1:
        scaled: Array = np.multiply(x, 1 / (1 + exp(-max(gate.item(), -700.0))))
        return scaled
    return by_rows(sigmoid_gate_into, np.empty(x.shape, x.dtype), x, gate)


@table.kernel("add", into=True)
def add(op: Op, x: Array, y: Array, *, out: Array | None = None) -> Array:
    """The ufunc alone, 1 us less than the reference's guard against warnings."""
    result: Array = np.add(x, y, out=out)
    return result


@table.kernel("zeros_like", into=True)
def zeros_like(op: Op, x: Array, *, out: Array | None = None) -> Array:
    """Zeros in the buffer given."""
    result = np.empty(x.shape, x.dtype) if out is None else out
    result.fill(0)
    return result


@table.kernel("mul")
def mul(op: Op, x: Array, y: Array) -> Array:
    """As ``add``."""
    result: Array = np.multiply(x, y)
    return result
