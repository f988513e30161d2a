"""Routing and experts of the NumPy backend.

Experts' weights are stored ``[in, out]`` and never gathered: a few tokens are products of single rows, many tokens are sorted by
expert and make one product an expert. The threads draw experts from a shared queue. Each token sums its experts by
ascending id, whichever thread finished first.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np

from deltaloom.backends.numpy.elementwise import swiglu_into
from deltaloom.backends.numpy.linear import STREAM, WORK, product
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import share, slices, team
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import dtype_in, is_param


class _Routing(Protocol):
    k: int
    normalize: bool


SORTED_WHOLE = 64
"""Experts up to which sorting all is faster than finding the k largest first."""

RESULTS = 1 << 24
"""Elements of experts' results that are held at once (64 MiB in float32); more tokens are done in parts."""

WANTS = {"gate_up": (0, 2, 1), "down": (0, 2, 1)}
WHEN = (dtype_in("x", f32, f64), is_param("gate_up"), is_param("down"))


@table.kernel("router_topk", when=(dtype_in("logits", f32, f64),))
def router_topk(op: Op, logits: Array) -> tuple[Array, Array]:
    """Only the k chosen probabilities are formed: normalised, they need no sum over all experts."""
    routing = cast(_Routing, op)
    rows = logits.reshape(-1, logits.shape[-1])
    if len(rows) == 1:
        chosen = _largest_of_one(rows[0], routing.k)
        weights = rows[:, chosen]
        ids = chosen[None]
    else:
        ids = _largest(rows, routing.k)
        weights = np.take_along_axis(rows, ids, axis=-1)
    highest = weights[:, :1].copy()
    weights -= highest
    np.exp(weights, out=weights)
    every = weights if routing.normalize else np.exp(rows - highest)
    weights /= every.sum(axis=-1, keepdims=True)
    shape = (*logits.shape[:-1], routing.k)
    return weights.reshape(shape), ids.astype(np.int32).reshape(shape)


def _largest_of_one(row: Array, k: int) -> Array:
    """``_largest`` of a single row with a third of the calls."""
    if len(row) <= SORTED_WHOLE or k == len(row):
        order: Array = (-row).argsort(kind="stable")
        return order[:k]
    found: Array = _largest(row[None], k)[0]
    return found


def _largest(rows: Array, k: int) -> Array:
    """The columns of the k largest of each row, largest first, ties to the lowest column."""
    columns = rows.shape[1]
    if columns <= SORTED_WHOLE or k == columns:
        return np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    chosen = np.sort(np.argpartition(rows, columns - k, axis=-1)[:, columns - k :], axis=-1)
    values = np.take_along_axis(rows, chosen, axis=-1)
    order = np.argsort(-values, axis=-1, kind="stable")
    found = np.take_along_axis(chosen, order, axis=-1)
    # A tie at the border: the partition may have taken any of the equal ones.
    tied = np.count_nonzero(rows >= values.min(axis=-1, keepdims=True), axis=-1) > k
    if tied.any():
        found[tied] = np.argsort(-rows[tied], axis=-1, kind="stable")[:, :k]
    return found


@table.kernel("moe_experts", when=WHEN, wants=WANTS)
def moe_experts(op: Op, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> Array:
    """One token: a row a chosen expert. More: one product an expert."""
    hidden, k = x.shape[-1], ids.shape[-1]
    rows, chosen, factors = x.reshape(-1, hidden), ids.reshape(-1, k), weights.reshape(-1, k)
    out = np.empty(rows.shape, x.dtype)
    if len(rows) == 1:
        _one_token(out, rows, factors[0], chosen[0], gate_up, down)
    else:
        step = max(1, RESULTS // (k * hidden))
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            _tokens(out[part], rows[part], factors[part], chosen[part], gate_up, down)
    return out.reshape(x.shape)


def _one_token(out: Array, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> None:
    """``x`` [1, H]; ``weights``, ``ids`` [k]."""
    order = ids.argsort()
    experts, inner = ids[order].tolist(), down.shape[1]
    both = np.empty((len(experts), 1, 2 * inner), x.dtype)
    results = np.empty((len(experts), x.shape[1]), x.dtype)

    def run(part: slice) -> None:
        for expert, target in zip(experts[part], both[part]):
            np.matmul(x, gate_up[expert], out=target)
        middle = both[part, :, :inner]
        swiglu_into(middle, middle, both[part, :, inner:])
        for expert, row, target in zip(experts[part], middle, results[part, None]):
            np.matmul(row, down[expert], out=target)

    share(run, len(experts), worth=3 * len(experts) * inner * x.shape[1] >= STREAM)
    np.matmul(weights[order], results, out=out[0])


def _tokens(out: Array, x: Array, weights: Array, ids: Array, gate_up: Array, down: Array) -> None:
    """``x`` [tokens, H]; ``weights``, ``ids`` [tokens, k]."""
    tokens, k = ids.shape
    inner = down.shape[1]
    order = ids.reshape(-1).argsort(kind="stable")
    counts = np.bincount(ids.reshape(-1), minlength=len(gate_up))
    ends = counts.cumsum()
    source = order // k
    results = np.empty((tokens * k, x.shape[1]), x.dtype)

    def run(expert: int) -> None:
        rows = slice(int(ends[expert] - counts[expert]), int(ends[expert]))
        both = np.empty((rows.stop - rows.start, 2 * inner), x.dtype)
        product(x.take(source[rows], axis=0), gate_up[expert], both)
        gate = both[:, :inner]
        swiglu_into(gate, gate, both[:, inner:])
        product(gate, down[expert], results[rows])

    team(3 * tokens * k * inner * x.shape[1] >= WORK).map(run, np.flatnonzero(counts).tolist())
    places = np.empty(tokens * k, np.intp)
    places[order] = np.arange(tokens * k)
    by_id = ids.argsort(axis=-1)
    places = np.take_along_axis(places.reshape(tokens, k), by_id, axis=-1)
    factors = np.take_along_axis(weights, by_id, axis=-1)

    def combine(part: slice) -> None:
        np.matmul(factors[part, None], results[places[part]], out=out[part, None])

    step = max(1, (1 << 18) // (k * x.shape[1]))
    team(results.size >= 1 << 20).map(combine, slices(tokens, -(-tokens // step)))
