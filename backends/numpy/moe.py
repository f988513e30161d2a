"""Routing and experts of the NumPy backend.

Experts' weights are stored ``[in, out]`` and never gathered: a few tokens are products of single rows, many tokens are sorted by
expert and make one product an expert. The threads draw experts from a shared queue. Each token sums its experts by
ascending id, whichever thread finished first.
"""

from __future__ import annotations

from math import exp
from typing import Protocol, cast

import numpy as np

from deltaloom.backends.numpy.elementwise import by_rows, one_plus_exp_negative, swiglu_into
from deltaloom.backends.numpy.linear import FEW_ROWS, STREAM, WORK, product, shared_product
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import share, slices, team
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import TensorType, bool_, f32, f64
from deltaloom.passes.kernel import dtype_in, input_type, is_param


class _Routing(Protocol):
    k: int
    normalize: bool


SORTED_WHOLE = 64
"""Experts up to which sorting all is faster than finding the k largest first."""

TILE = 4
"""Rows that an expert's product is a multiple of: OpenBLAS takes longer for 10 rows than for 12 (41 against 56 GFLOP/s)."""

RESULTS = 1 << 24
"""Elements of experts' results that are held at once (64 MiB in float32); more tokens are done in parts."""

WANTS = {"gate_up": (0, 2, 1), "down": (0, 2, 1)}
WHEN = (dtype_in("x", f32, f64), is_param("gate_up"), is_param("down"))


def _router_scratch(node: Node) -> tuple[TensorType, ...]:
    """A copy of the logits, and which of them are chosen."""
    logits = input_type(node, "logits")
    rows = (logits.elements() // cast(int, logits.shape[-1]), logits.shape[-1])
    return TensorType(logits.dtype, rows), TensorType(bool_, rows)


@table.kernel("router_topk", when=(dtype_in("logits", f32, f64),), scratch=_router_scratch)
def router_topk(op: Op, logits: Array, *, scratch: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
    """Only the k chosen probabilities are formed: normalised, they need no sum over all experts."""
    routing = cast(_Routing, op)
    rows = logits.reshape(-1, logits.shape[-1])
    copy, above = scratch or (np.empty(rows.shape, rows.dtype), np.empty(rows.shape, bool))
    if len(rows) == 1:
        chosen = _largest_of_one(rows[0], routing.k, copy, above)
        weights = rows[:, chosen]
        ids = chosen[None]
    else:
        ids = _largest(rows, routing.k, copy, above)
        weights = np.take_along_axis(rows, ids, axis=-1)
    highest = weights[:, :1].copy()
    weights -= highest
    np.exp(weights, out=weights)
    every = weights if routing.normalize else np.exp(np.subtract(rows, highest, out=copy), out=copy)
    weights /= every.sum(axis=-1, keepdims=True)
    shape = (*logits.shape[:-1], routing.k)
    return weights.reshape(shape), ids.astype(np.int32).reshape(shape)


def _largest_of_one(row: Array, k: int, copy: Array, above: Array) -> Array:
    """``_largest`` of a single row with a third of the calls."""
    if len(row) <= SORTED_WHOLE or k == len(row):
        order: Array = (-row).argsort(kind="stable")
        return order[:k]
    found: Array = _largest(row[None], k, copy, above)[0]
    return found


def _largest(rows: Array, k: int, copy: Array, above: Array) -> Array:
    """The columns of the k largest of each row, largest first, ties to the lowest column; ``copy`` and ``above`` are scratch."""
    columns = rows.shape[1]
    if columns <= SORTED_WHOLE or k == columns:
        return np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    copy[...] = rows
    copy.partition(columns - k, axis=-1)
    np.greater_equal(rows, copy[:, columns - k, None], out=above)
    if (np.count_nonzero(above, axis=-1) != k).any():
        # A tie at the border, or what is no number.
        return np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    chosen = above.nonzero()[1].reshape(len(rows), k)
    order = np.argsort(-np.take_along_axis(rows, chosen, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(chosen, order, axis=-1)


def _gated_router_scratch(node: Node) -> tuple[TensorType, ...]:
    """Those of the router, without the column of the gate."""
    return tuple(one.with_shape(one.shape[0], one.shape[1] - 1) for one in _router_scratch(node))


@table.kernel("gated_router", when=(dtype_in("logits", f32, f64),), scratch=_gated_router_scratch)
def gated_router(op: Op, logits: Array, *, scratch: tuple[Array, Array] | None = None) -> tuple[Array, Array, Array]:
    """The gate is a view of the last column."""
    weights, ids = router_topk(op, logits[..., :-1], scratch=scratch)
    return weights, ids, logits[..., -1:]


def _scratch(node: Node) -> tuple[TensorType, ...]:
    """For every chosen expert of every token: its input, both halves of its inner layer, their product and its result."""
    ids, x, down = (input_type(node, name) for name in ("ids", "x", "down"))
    chosen, inner, hidden = ids.elements(), down.shape[2], x.shape[2]
    return tuple(TensorType(x.dtype, (chosen, width)) for width in (hidden, 2 * inner, inner, hidden))


def _shared_scratch(node: Node) -> tuple[TensorType, ...]:
    """Those of the experts, then the shared one's halves, their product and its result."""
    x, down = input_type(node, "x"), input_type(node, "shared_down")
    tokens, (hidden, inner) = x.shape[0] * x.shape[1], down.shape
    return (*_scratch(node), *(TensorType(x.dtype, (tokens, width)) for width in (2 * inner, inner, hidden)))


@table.kernel("shared_moe", when=WHEN, wants=WANTS, into=True, scratch=_shared_scratch)
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
    scratch: tuple[Array, ...] | None = None,
) -> Array:
    """The routed experts, to which the shared one is added while its rows are in the cache."""
    result = moe_experts(op, x, weights, ids, gate_up, down, out=out, scratch=scratch and scratch[:4])
    hidden, inner = shared_down.shape
    rows, sums = x.reshape(-1, hidden), result.reshape(-1, hidden)
    buffers = scratch[4:] if scratch else [np.empty((len(rows), width), x.dtype) for width in (2 * inner, inner, hidden)]
    if len(rows) == 1 and shared_gate_up.size < STREAM:
        _shared_row(sums, rows, gate.item(), shared_gate_up.T, shared_down.T, *buffers)
        return result
    both, middle, extra = buffers
    shared_product(rows, shared_gate_up.T, both)
    by_rows(lambda middle, both: swiglu_into(middle, both[:, :inner], both[:, inner:]), middle, both)
    shared_product(middle, shared_down.T, extra)

    def add(extra: Array, sums: Array, gates: Array) -> None:
        extra /= one_plus_exp_negative(gates)
        sums += extra

    by_rows(add, extra, sums, gate.reshape(-1, 1))
    return result


def _shared_row(sums: Array, x: Array, gate: float, gate_up: Array, down: Array, both: Array, middle: Array, extra: Array) -> None:
    """The shared expert of one small token, [1, ...] everywhere."""
    inner = len(down)
    x[0].dot(gate_up, both[0])
    swiglu_into(middle, both[:, :inner], both[:, inner:])
    middle[0].dot(down, extra[0])
    extra *= 1 / (1 + exp(-max(gate, -700.0)))
    sums += extra


@table.kernel("moe_experts", when=WHEN, wants=WANTS, into=True, scratch=_scratch)
def moe_experts(
    op: Op,
    x: Array,
    weights: Array,
    ids: Array,
    gate_up: Array,
    down: Array,
    *,
    out: Array | None = None,
    scratch: tuple[Array, ...] | None = None,
) -> Array:
    """One token: a row a chosen expert. More: one product an expert."""
    hidden, k = x.shape[-1], ids.shape[-1]
    rows, chosen, factors = x.reshape(-1, hidden), ids.reshape(-1, k), weights.reshape(-1, k)
    result = np.empty(x.shape, x.dtype) if out is None else out
    sums = result.reshape(rows.shape)
    if len(rows) == 1:
        _one_token(sums, rows, factors[0], chosen[0], gate_up, down, scratch)
    else:
        step = len(rows) if scratch else max(1, RESULTS // (k * hidden))
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            _tokens(sums[part], rows[part], factors[part], chosen[part], gate_up, down, scratch)
    return result


def _one_token(
    out: Array, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array, scratch: tuple[Array, ...] | None
) -> None:
    """``x`` [1, H]; ``weights``, ``ids`` [k]."""
    order = ids.argsort()
    experts, inner = ids[order].tolist(), down.shape[1]
    widths = (2 * inner, inner, x.shape[1])
    both, middle, results = scratch[1:] if scratch else [np.empty((len(experts), width), x.dtype) for width in widths]

    def run(part: slice) -> None:
        for expert, target in zip(experts[part], both[part]):
            row.dot(gate_up[expert], target)
        swiglu_into(middle[part], both[part, :inner], both[part, inner:])
        for expert, given, target in zip(experts[part], middle[part], results[part]):
            given.dot(down[expert], target)

    row = x[0]
    share(run, len(experts), worth=3 * len(experts) * inner * x.shape[1] >= STREAM)
    weights[order].dot(results, out[0])


def _tokens(
    out: Array, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array, scratch: tuple[Array, ...] | None
) -> None:
    """``x`` [tokens, H]; ``weights``, ``ids`` [tokens, k]. Without ``scratch`` each expert's temporaries are its own, and its rows
    are filled up to whole tiles with zeros."""
    tokens, k = ids.shape
    inner, hidden = down.shape[1], x.shape[1]
    order = ids.reshape(-1).argsort(kind="stable")
    counts = np.bincount(ids.reshape(-1), minlength=len(gate_up))
    ends = counts.cumsum()
    source = order // k
    held = counts if scratch else np.where(counts > FEW_ROWS, -(-counts // TILE) * TILE, counts)
    firsts = held.cumsum() - held
    results = scratch[3] if scratch else np.empty((int(held.sum()), hidden), x.dtype)

    def run(expert: int) -> None:
        end, count = int(ends[expert]), int(counts[expert])
        rows = slice(int(firsts[expert]), int(firsts[expert] + held[expert]))
        if scratch:
            given, both, middle = (buffer[rows] for buffer in scratch[:3])
        else:
            given, both, middle = (np.empty((rows.stop - rows.start, width), x.dtype) for width in (hidden, 2 * inner, inner))
        x.take(source[end - count : end], axis=0, out=given[:count], mode="clip")
        given[count:] = 0
        product(given, gate_up[expert], both)
        swiglu_into(middle, both[:, :inner], both[:, inner:])
        product(middle, down[expert], results[rows])

    team(3 * tokens * k * inner * hidden >= WORK).map(run, np.flatnonzero(counts).tolist())
    places = np.empty(tokens * k, np.intp)
    places[order] = np.arange(tokens * k) + np.repeat(firsts - (ends - counts), counts)
    by_id = ids.argsort(axis=-1)
    places = np.take_along_axis(places.reshape(tokens, k), by_id, axis=-1)
    factors = np.take_along_axis(weights, by_id, axis=-1)

    def combine(part: slice) -> None:
        rows = places[part].reshape(-1)
        # Done with the experts' inputs, their buffer holds the results in the order of the tokens.
        sorted_results = (
            scratch[0][part.start * k : part.start * k + len(rows)] if scratch else np.empty((len(rows), hidden), x.dtype)
        )
        results.take(rows, axis=0, out=sorted_results, mode="clip")
        np.matmul(factors[part, None], sorted_results.reshape(-1, k, hidden), out=out[part, None])

    step = max(1, (1 << 18) // (k * hidden))
    team(results.size >= 1 << 20).map(combine, slices(tokens, -(-tokens // step)))
