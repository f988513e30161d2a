"""Causal attention of the NumPy backend, over caches that are written in place (Qwen3-Next specification, section 6).

Query heads that share a key head are rows of one product, so keys and values are never repeated. Softmax is in the
compute dtype (float32 or float64); a row without any allowed key gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from deltaloom.backends.numpy.elementwise import by_rows, one_plus_exp_negative, sigmoid_gate_into
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import share, team
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import TensorType, f32, f64
from deltaloom.passes.kernel import Appended, dtype_in, input_type, size


class _HasScale(Protocol):
    scale: float


QUERIES = 64
KEYS = 512
"""Query positions and keys of a block: with 8 grouped heads its scores take 1 MiB, whatever the context."""

WORK = 1 << 23
"""Multiply-adds from which a call is worth two threads."""

FLOAT = dtype_in("q", f32, f64)


def _append(k: Array, v: Array, key_cache: Appended, value_cache: Appended) -> tuple[Array, Array]:
    """Write the new entries behind the filled ones; the filled caches, new entries included."""
    past = int(key_cache.length)
    end = past + k.shape[1]
    key_cache.data[:, :, past:end] = k.transpose(0, 2, 1, 3)
    value_cache.data[:, :, past:end] = v.transpose(0, 2, 1, 3)
    return key_cache.data[:, :, :end], value_cache.data[:, :, :end]


def _step_scratch(node: Node) -> tuple[TensorType, ...]:
    """Scaled queries, and scores of the past and the new token."""
    q, cache = input_type(node, "q"), input_type(node, "key_cache")
    return q, TensorType(q.dtype, (q.shape[0], q.shape[2], cache.shape[2] + 1))


@table.kernel("attention", when=(size("q", 1, equals=1), FLOAT), into=True, scratch=_step_scratch)
def attention_step(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    key_cache: Appended,
    value_cache: Appended,
    valid: Array | None = None,
    *,
    out: Array | None = None,
    scratch: tuple[Array, Array] | None = None,
) -> Array:
    """One token: a product with all keys, a softmax and a product with all values, for the heads of a group at once."""
    keys, values = _append(k, v, key_cache, value_cache)
    batch, _, query_heads, width = q.shape
    key_heads, columns = keys.shape[1:3]
    repeats = query_heads // key_heads
    mask = None if valid is None or valid.all() else valid[:, None, None, :]
    result = np.empty((batch, 1, query_heads, values.shape[-1]), q.dtype) if out is None else out
    grouped = result.reshape(batch, key_heads, repeats, -1)
    if scratch:
        scaled, every = scratch[0], scratch[1].reshape(-1)[: batch * query_heads * columns]
    else:
        scaled, every = np.empty(q.shape, q.dtype), np.empty(batch * query_heads * columns, q.dtype)
    queries = np.multiply(q, cast(_HasScale, op).scale, out=scaled).reshape(batch, key_heads, repeats, width)
    every = every.reshape(batch, key_heads, repeats, columns)

    def run(head: slice) -> None:
        scores = np.matmul(queries[:, head], keys[:, head].swapaxes(-1, -2), out=every[:, head])
        if mask is not None:
            np.copyto(scores, -np.inf, where=~mask)
        highest = scores.max(axis=-1, keepdims=True)
        if mask is not None:
            np.copyto(highest, 0, where=np.isneginf(highest))
        scores -= highest
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        part = np.matmul(scores, values[:, head], out=grouped[:, head])
        if mask is not None:
            np.copyto(total, 1, where=total == 0)
        part /= total

    share(run, key_heads, worth=batch * query_heads * columns * width >= WORK)
    return result


@table.kernel("attention", when=(FLOAT,), into=True)
def attention_blocks(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    key_cache: Appended,
    value_cache: Appended,
    valid: Array | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """Blocks of queries against blocks of keys with a running maximum and sum (as FlashAttention does), in bounded memory;
    blocks above the diagonal are skipped. The threads share batch rows, key heads and query blocks, the longest first."""
    keys, values = _append(k, v, key_cache, value_cache)
    batch, seq, query_heads, width = q.shape
    key_heads, columns = keys.shape[1:3]
    past, repeats = columns - seq, query_heads // key_heads
    mask = None if valid is None or valid.all() else valid
    scale = cast(_HasScale, op).scale
    result = np.empty((batch, seq, query_heads, values.shape[-1]), q.dtype) if out is None else out

    def run(item: tuple[int, int, int]) -> None:
        start, row, head = item
        stop = min(start + QUERIES, seq)
        heads = slice(head * repeats, (head + 1) * repeats)
        queries = np.multiply(q[row, start:stop, heads].swapaxes(0, 1), scale, order="C")
        seen = None if mask is None else mask[row]
        answer = _rows(queries, keys[row, head], values[row, head], past + start, seen)
        result[row, start:stop, heads] = answer.swapaxes(0, 1)

    items = [(s, b, h) for s in reversed(range(0, seq, QUERIES)) for b in range(batch) for h in range(key_heads)]
    team(batch * seq * query_heads * columns * width >= WORK).map(run, items)
    return result


def _gated(
    attention: Callable[..., Array],
    gate: Array,
    inputs: tuple[Op, Array, Array, Array, Appended, Appended, Array | None],
    out: Array | None,
    divisor: Array | None,
    **scratch: tuple[Array, ...] | None,
) -> Array:
    """The heads of ``attention`` written flat, then gated in place; ``divisor`` is scratch for that."""
    result = np.empty(gate.shape, gate.dtype) if out is None else out
    attention(*inputs, out=result.reshape(inputs[1].shape), **scratch)
    if divisor is None:
        return by_rows(lambda result, gate: sigmoid_gate_into(result, result, gate), result, gate)

    def run(result: Array, gate: Array, divisor: Array) -> None:
        np.divide(result, one_plus_exp_negative(gate, divisor), out=result)

    return by_rows(run, result, gate, divisor)


def _gated_scratch(node: Node) -> tuple[TensorType, ...]:
    """What the attention takes, and the divisor of the gate."""
    return *_step_scratch(node), input_type(node, "gate")


@table.kernel("gated_attention", when=(size("q", 1, equals=1), FLOAT), into=True, scratch=_gated_scratch)
def gated_attention_step(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    gate: Array,
    key_cache: Appended,
    value_cache: Appended,
    valid: Array | None = None,
    *,
    out: Array | None = None,
    scratch: tuple[Array, Array, Array] | None = None,
) -> Array:
    """``attention_step`` with the gate at its end."""
    inputs = (op, q, k, v, key_cache, value_cache, valid)
    return _gated(attention_step, gate, inputs, out, scratch and scratch[2], scratch=scratch and scratch[:2])


@table.kernel("gated_attention", when=(FLOAT,), into=True)
def gated_attention_blocks(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    gate: Array,
    key_cache: Appended,
    value_cache: Appended,
    valid: Array | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """``attention_blocks`` with the gate at its end."""
    return _gated(attention_blocks, gate, (op, q, k, v, key_cache, value_cache, valid), out, None)


def _rows(queries: Array, keys: Array, values: Array, first: int, valid: Array | None) -> Array:
    """Attention of scaled queries [heads, rows, width] at positions ``first``, ``first + 1``, ... over keys and values
    [columns, width]; result [heads, rows, value width]."""
    heads, rows, width = queries.shape
    flat = queries.reshape(heads * rows, width)
    end = first + rows
    total = np.zeros((heads * rows, 1), queries.dtype)
    highest = np.full((heads * rows, 1), -np.inf, queries.dtype)
    result = np.zeros((heads * rows, values.shape[-1]), queries.dtype)
    for low in range(0, end, KEYS):
        high = min(low + KEYS, end)
        if valid is not None and not valid[low:high].any():
            continue
        scores = flat @ keys[low:high].T
        if high > first + 1:
            edge = max(low, first + 1)
            shown = scores.reshape(heads, rows, high - low)[:, :, edge - low :]
            shown += _ahead(rows, edge - first, high - edge, queries.dtype)
        if valid is not None:
            np.copyto(scores, -np.inf, where=~valid[low:high])
        top = np.maximum(highest, scores.max(axis=-1, keepdims=True))
        finite = np.where(np.isneginf(top), 0, top) if valid is not None else top
        scores -= finite
        np.exp(scores, out=scores)
        if low:
            faded = np.exp(highest - finite)
            total *= faded
            result *= faded
        total += scores.sum(axis=-1, keepdims=True)
        result += scores @ values[low:high]
        highest = top
    np.copyto(total, 1, where=total == 0)
    result /= total
    return result.reshape(heads, rows, values.shape[-1])


def _ahead(rows: int, offset: int, columns: int, dtype: np.dtype[np.generic]) -> Array:
    """-inf where column ``offset + j`` lies after row ``i``, else 0."""
    ahead = offset + np.arange(columns) > np.arange(rows)[:, None]
    return np.where(ahead, -np.inf, 0).astype(dtype)
