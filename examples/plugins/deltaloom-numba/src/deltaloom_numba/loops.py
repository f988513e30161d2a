"""The compiled loops. Weights in bfloat16 come as their bits, uint16, and are widened in registers: a weight is read once.

What is cached on disk is renewed when this file changes, and this file only: a loop may call nothing that is compiled elsewhere.
A weight may be a read-only view of a file, hence the types.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deltaloom.graph.op import Array
from deltaloom_numba.compiled import compiled, inlined

MATRIX, STACK, STACKS = (types.Array(types.float32, rank, "C") for rank in (2, 3, 4))
LIST, GIVEN = (types.Array(types.float32, rank, "C", readonly=True) for rank in (1, 2))
IDS, ORDER = (types.Array(number, 2, "C", readonly=True) for number in (types.int32, types.intp))
HALVES, HALF_STACK = (types.Array(types.uint16, rank, "C", readonly=True) for rank in (2, 3))
COUNT = types.intp


@intrinsic  # type: ignore[untyped-decorator]
def _float_of(typing: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@inlined
def _dot(row: Array, x: Array) -> Any:
    """The product of a row of bfloat16 bits and one of float32."""
    total = np.float32(0)
    for i in range(len(x)):
        total += _float_of(np.uint32(row[i]) << np.uint32(16)) * x[i]
    return total


@inlined
def _sigmoid(x: Any) -> Any:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


@inlined
def _silu(x: Any) -> Any:
    return x / (np.float32(1) + np.exp(-x))


@compiled(types.void(GIVEN, HALVES, MATRIX, COUNT, COUNT))
def multiply_rows(x: Array, weight: Array, out: Array, start: int, stop: int) -> None:
    """``out[:, start:stop] = x @ weight[start:stop].T``; a row of the weight serves all rows of x while it is in the cache."""
    for o in range(start, stop):
        for r in range(len(x)):
            out[r, o] = _dot(weight[o], x[r])


@compiled(types.void(HALVES, MATRIX))
def widen(weight: Array, out: Array) -> None:
    """``out = float32(weight)``."""
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            out[o, i] = _float_of(np.uint32(weight[o, i]) << np.uint32(16))


@compiled(types.void(GIVEN, IDS, HALF_STACK, HALVES, MATRIX, COUNT, COUNT))
def expert_inner(x: Array, ids: Array, gate_up: Array, shared: Array, inner: Array, start: int, stop: int) -> None:
    """Elements ``start`` to ``stop`` of the flattened ``inner`` [tokens, k I + S]: silu(gate) up of each token's chosen experts,
    whose ``gate_up`` is [E, 2 I, H], then of the shared one, [2 S, H]."""
    width, own, alone = inner.shape[1], gate_up.shape[1] // 2, shared.shape[0] // 2
    routed = ids.shape[1] * own
    for unit in range(start, stop):
        token, column = unit // width, unit % width
        if column < routed:
            expert, row = ids[token, column // own], column % own
            gate, up = _dot(gate_up[expert, row], x[token]), _dot(gate_up[expert, own + row], x[token])
        else:
            row = column - routed
            gate, up = _dot(shared[row], x[token]), _dot(shared[alone + row], x[token])
        inner[token, column] = _silu(gate) * up


@compiled(types.void(GIVEN, IDS, ORDER, GIVEN, LIST, HALF_STACK, HALVES, MATRIX, COUNT, COUNT))
def expert_outer(
    inner: Array,
    ids: Array,
    order: Array,
    factors: Array,
    gates: Array,
    down: Array,
    shared: Array,
    out: Array,
    start: int,
    stop: int,
) -> None:
    """Elements ``start`` to ``stop`` of the flattened ``out`` [tokens, H]: the sum of the chosen experts, each times its factor, in
    ``order`` [tokens, k], then the shared one times the sigmoid of its gate; ``inner`` as ``expert_inner`` left it."""
    hidden, own, alone = out.shape[1], down.shape[2], shared.shape[1]
    k = ids.shape[1]
    for token in range(start // hidden, (stop + hidden - 1) // hidden):
        first, last = max(start - token * hidden, 0), min(stop - token * hidden, hidden)
        out[token, first:last] = 0
        # Expert by expert, so that the memory is read in long runs.
        for j in order[token]:
            weight, given = down[ids[token, j]], inner[token, j * own : (j + 1) * own]
            for row in range(first, last):
                out[token, row] += factors[token, j] * _dot(weight[row], given)
        if alone:
            factor = _sigmoid(gates[token])
            for row in range(first, last):
                out[token, row] += factor * _dot(shared[row], inner[token, k * own :])


@inlined
def _convolved(out: Array, first: int, new: Array, taps: Array, held: Array) -> None:
    """``out`` = silu of the convolution of the channels from ``first`` on, whose new column is appended to those that are held."""
    older = len(held)
    for i in range(len(out)):
        channel = first + i
        total = new[channel] * taps[older, channel]
        for tap in range(older):
            total += held[tap, channel] * taps[tap, channel]
        for tap in range(older - 1):
            held[tap, channel] = held[tap + 1, channel]
        if older:
            held[older - 1, channel] = new[channel]
        out[i] = _silu(total)


@inlined
def _scaled(x: Array, eps: Any, factor: Any) -> None:
    """x = factor x / sqrt(x x + eps)."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    by = factor / np.sqrt(total + eps)
    for i in range(len(x)):
        x[i] *= by


@inlined
def _advanced(state: Array, query: Array, key: Array, value: Array, decay: Any, beta: Any, out: Array, delta: Array) -> None:
    """One token of one head: out = g q S + (q k) delta with the old state and delta = beta (v - g k S); S = g S + k delta."""
    out[:] = 0
    delta[:] = 0
    match = np.float32(0)
    for i in range(len(key)):
        match += query[i] * key[i]
    even = len(key) - len(key) % 2
    for i in range(0, even, 2):  # two rows at a time halve the traffic of the sums
        q0, q1, k0, k1 = query[i], query[i + 1], key[i], key[i + 1]
        for j in range(len(out)):
            first, second = state[i, j], state[i + 1, j]
            out[j] += q0 * first + q1 * second
            delta[j] += k0 * first + k1 * second
    for i in range(even, len(key)):
        for j in range(len(out)):
            out[j] += query[i] * state[i, j]
            delta[j] += key[i] * state[i, j]
    for j in range(len(out)):
        delta[j] = beta * (value[j] - decay * delta[j])
        out[j] = decay * out[j] + match * delta[j]
    for i in range(len(key)):
        k = key[i]
        for j in range(len(out)):
            state[i, j] = decay * state[i, j] + k * delta[j]


@compiled(types.void(GIVEN, GIVEN, LIST, LIST, LIST, STACK, STACKS, MATRIX, types.UniTuple(types.float32, 3), COUNT, COUNT, COUNT))
def delta_net_step(
    projected: Array,
    taps: Array,
    a_log: Array,
    dt_bias: Array,
    norm: Array,
    conv: Array,
    delta: Array,
    out: Array,
    settings: tuple[float, float, float],
    key_heads: int,
    start: int,
    stop: int,
) -> None:
    """One token of the key heads ``start`` to ``stop``, counted through the batch. ``projected`` [batch, q | k | v | z | b | a];
    taps [K, C]; a_log, dt_bias [Hv]; norm [dv]; conv [batch, K - 1, C] and delta [batch, Hv, dk, dv] are advanced; out
    [batch, Hv dv]; ``settings``: scale of the queries, eps of their norm, eps of the last norm."""
    scale, l2_eps, eps = settings
    value_heads, key_dim, value_dim = delta.shape[1], delta.shape[2], delta.shape[3]
    keys, values, repeats = key_heads * key_dim, value_heads * value_dim, value_heads // key_heads
    query, key = np.empty(key_dim, np.float32), np.empty(key_dim, np.float32)
    value, update = np.empty(value_dim, np.float32), np.empty(value_dim, np.float32)
    for unit in range(start, stop):
        row, head = unit // key_heads, unit % key_heads
        given, held = projected[row], conv[row]
        _convolved(query, head * key_dim, given, taps, held)
        _convolved(key, keys + head * key_dim, given, taps, held)
        _scaled(query, l2_eps, scale)
        _scaled(key, l2_eps, np.float32(1))
        for own in range(head * repeats, (head + 1) * repeats):
            first = own * value_dim
            _convolved(value, 2 * keys + first, given, taps, held)
            b = given[2 * keys + 2 * values + own]
            a = given[2 * keys + 2 * values + value_heads + own] + dt_bias[own]
            softplus = max(a, np.float32(0)) + np.log1p(np.exp(-abs(a)))
            decay = np.exp(-np.exp(a_log[own]) * softplus)
            answer = out[row, first : first + value_dim]
            _advanced(delta[row, own], query, key, value, decay, _sigmoid(b), answer, update)
            _scaled(answer, eps * np.float32(value_dim), np.sqrt(np.float32(value_dim)))
            gate = given[2 * keys + values + first :]
            for i in range(value_dim):
                answer[i] *= norm[i] * _silu(gate[i])
