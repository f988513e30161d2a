"""Experts with bfloat16 weights. Few tokens read the rows of the experts that they chose, in two steps: the threads share the
elements of all inner layers, then those of the result, so that none of them waits for the one with an expert more."""

from __future__ import annotations

import numpy as np

from deltaloom.backends.numpy.elementwise import by_rows, one_plus_exp_negative, swiglu_into
from deltaloom.backends.numpy.quantized import routed
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32
from deltaloom.passes.kernel import dtype_in, weights_in_bfloat16
from deltaloom_numba.linear import FEW_ROWS, linear, multiply
from deltaloom_numba.loops import expert_inner, expert_outer
from deltaloom_numba.table import bits, shared, table

WHEN = (dtype_in("x", f32), weights_in_bfloat16)


@table.kernel("moe_experts", when=WHEN, into=True, quantised=True)
def moe_experts(op: Op, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array, *, out: Array | None = None) -> Array:
    """More tokens: one product an expert."""
    if x.shape[0] * x.shape[1] > FEW_ROWS:
        return routed(x, weights, ids, gate_up, down, out, multiply)
    hidden = x.shape[-1]
    none = np.empty((0, hidden), np.uint16), np.empty((hidden, 0), np.uint16)
    return _few(x, weights, ids, np.zeros(x.shape[:2], np.float32), (bits(gate_up), bits(down)), none, out)


@table.kernel("shared_moe", when=WHEN, into=True, quantised=True)
def shared_moe(
    op: Op,
    x: Array,
    weights: Array,
    ids: Array,
    gate: Array,
    gate_up: Array,
    down: Array,
    shared_gate_up: Array,
    shared_down: Array,
    *,
    out: Array | None = None,
) -> Array:
    """The shared expert is one more, whose factor is the sigmoid of its gate."""
    if x.shape[0] * x.shape[1] <= FEW_ROWS:
        return _few(x, weights, ids, gate, (bits(gate_up), bits(down)), (bits(shared_gate_up), bits(shared_down)), out)
    result = routed(x, weights, ids, gate_up, down, out, multiply)
    pair = linear(op, x, shared_gate_up)
    inner = np.empty((*pair.shape[:-1], shared_down.shape[1]), np.float32)
    width = inner.shape[-1]
    by_rows(lambda inner, pair: swiglu_into(inner, pair[..., :width], pair[..., width:]), inner, pair)
    extra = linear(op, inner, shared_down)
    extra /= one_plus_exp_negative(gate)
    result += extra
    return result


def _few(
    x: Array,
    weights: Array,
    ids: Array,
    gate: Array,
    experts: tuple[Array, Array],
    alone: tuple[Array, Array],
    out: Array | None,
) -> Array:
    """A few tokens; gate_up and down of the ``experts`` and of the one ``alone``, which may be of width 0, as bits. Experts are
    summed by ascending id."""
    hidden, k = x.shape[-1], ids.shape[-1]
    rows, chosen, factors, gates = (
        np.ascontiguousarray(part) for part in (x.reshape(-1, hidden), ids.reshape(-1, k), weights.reshape(-1, k), gate.reshape(-1))
    )
    order = chosen.argsort(axis=-1, kind="stable")
    result = np.empty(x.shape, np.float32) if out is None else out
    sums = result.reshape(rows.shape)
    inner = np.empty((len(rows), k * experts[1].shape[2] + alone[1].shape[1]), np.float32)
    read = inner.size * hidden
    shared(lambda start, stop: expert_inner(rows, chosen, experts[0], alone[0], inner, start, stop), inner.size, 2 * read)
    outer = inner, chosen, order, factors, gates, experts[1], alone[1], sums
    shared(lambda start, stop: expert_outer(*outer, start, stop), sums.size, read)
    return result
