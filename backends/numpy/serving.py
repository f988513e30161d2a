"""Serving forms of the NumPy backend: the kernels of the base ops, sequence by sequence or, with as many tokens each, as a batch.

Pools are written in place. States that a step reads are copied before anything is written, so that a slot may be read by one
sequence and written by another; a single token of a sequence that reads and writes its own large slot works in it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltaloom.backends.numpy.attention import FLOAT, attention_blocks, attention_step
from deltaloom.backends.numpy.convolution import WANTS, WHEN, convolution, convolution_step
from deltaloom.backends.numpy.delta_net import delta_net_step
from deltaloom.backends.numpy.delta_rule import delta_chunks, delta_step
from deltaloom.backends.numpy.elementwise import by_rows, sigmoid_gate_into
from deltaloom.backends.numpy.table import table
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.ops.serving import pieces, sequence_bounds
from deltaloom.passes.kernel import Appended, absent, dtype_in, is_param

IN_PLACE = 1 << 16
"""Bytes of a slot from which one sequence after the other in place is faster than copying all into a batch and back."""

Step = Callable[..., tuple[Array, ...]]
"""Inputs, then states [sequences, ...] -> the output, then the new states."""


@table.kernel("paged_attention", when=(FLOAT,), into=True)
def paged_attention(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    key_pool: Array,
    value_pool: Array,
    block_tables: Array,
    context_lengths: Array,
    query_starts: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The blocks of a sequence are put side by side, with room for the new entries, which the base kernel appends and reads."""
    bounds = sequence_bounds(q.shape[1], len(context_lengths), query_starts)
    result = np.empty((*q.shape[:3], v.shape[3]), q.dtype) if out is None else out
    for blocks, past, start, stop in zip(block_tables, context_lengths.tolist(), bounds, bounds[1:]):
        if start < stop:
            now = slice(start, stop)
            keys, values = (_side_by_side(pool, blocks, past, stop - start) for pool in (key_pool, value_pool))
            run = attention_step if stop - start == 1 else attention_blocks
            run(op, q[:, now], k[:, now], v[:, now], keys, values, out=result[:, now])
    result[:, bounds[-1] :] = 0
    lengths = np.diff(bounds)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(bounds[-1]) + np.repeat(context_lengths - bounds[:-1], lengths)
    size = key_pool.shape[2]
    blocks, places = block_tables[rows, positions // size], positions % size
    key_pool[blocks, :, places] = k[0, : bounds[-1]]
    value_pool[blocks, :, places] = v[0, : bounds[-1]]
    return result, key_pool, value_pool


@table.kernel("gated_paged_attention", when=(FLOAT,), into=True)
def gated_paged_attention(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    gate: Array,
    key_pool: Array,
    value_pool: Array,
    block_tables: Array,
    context_lengths: Array,
    query_starts: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The heads are written flat, then gated in place."""
    result = np.empty(gate.shape, gate.dtype) if out is None else out
    heads = result.reshape(*q.shape[:3], v.shape[3])
    layout = (block_tables, context_lengths, query_starts)
    paged_attention(op, q, k, v, key_pool, value_pool, *layout, out=heads)
    by_rows(lambda result, gate: sigmoid_gate_into(result, result, gate), result, gate)
    return result, key_pool, value_pool


def _side_by_side(pool: Array, blocks: Array, past: int, new: int) -> Appended:
    """The first ``past`` positions of a sequence as a cache [1, heads, columns, width] with room for ``new`` more: one copy."""
    _, heads, size, width = pool.shape
    used = blocks[: -(-(past + new) // size)]
    at = used * heads + np.arange(heads)[:, None]
    data = pool.reshape(-1, size, width).take(at, axis=0)
    return Appended(data.reshape(1, heads, len(used) * size, width), past)


@table.kernel("packed_causal_conv1d", when=WHEN, wants=WANTS, into=True)
def packed_causal_conv1d(
    op: Op,
    x: Array,
    weight: Array,
    pool: Array,
    read_slots: Array,
    write_slots: Array,
    query_starts: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Where all sequences have as many tokens they go step by step as a batch."""

    def one(x: Array, state: Array) -> tuple[Array, Array]:
        return convolution_step(op, x, weight, state)

    def many(x: Array, state: Array) -> tuple[Array, Array]:
        return convolution(op, x, weight, state)

    result = np.empty_like(x) if out is None else out
    if query_starts is None:
        _batch((x,), result, (pool,), read_slots, write_slots, one)
    else:
        _one_by_one((x,), result, pool, read_slots, write_slots, query_starts, one, many)
    return result, pool


@table.kernel("packed_gated_delta_rule", when=(dtype_in("v", f32, f64),), into=True)
def packed_gated_delta_rule(
    op: Op,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    pool: Array,
    read_slots: Array,
    write_slots: Array,
    query_starts: Array | None = None,
    *,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """One token between two writes: the recurrent form; more: chunks."""

    def one(*inputs: Array) -> tuple[Array, Array]:
        return delta_step(op, *inputs)

    def many(*inputs: Array) -> tuple[Array, Array]:
        return delta_chunks(op, *inputs)

    result = np.empty_like(v) if out is None else out
    sequence = (q, k, v, log_decay, beta)
    if query_starts is None:
        _batch(sequence, result, (pool,), read_slots, write_slots, one)
    else:
        _one_by_one(sequence, result, pool, read_slots, write_slots, query_starts, one, many)
    return result, pool


@table.kernel(
    "packed_gated_delta_net",
    when=(absent("query_starts"), dtype_in("projected", f32, f64), is_param("conv_weight")),
    wants={"conv_weight": (2, 1, 0)},
    into=True,
)
def packed_gated_delta_net(
    op: Op,
    projected: Array,
    conv_weight: Array,
    a_log: Array,
    dt_bias: Array,
    norm_weight: Array,
    conv: Array,
    delta: Array,
    read_slots: Array,
    write_slots: Array,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The kernel of the base op for one token, over all sequences, token by token. Sequences of any length run in parts."""

    def one(x: Array, conv: Array, delta: Array) -> tuple[Array, Array, Array]:
        return delta_net_step(op, x, conv_weight, a_log, dt_bias, norm_weight, conv, delta)

    width = norm_weight.shape[0] * a_log.shape[0]
    result = np.empty((*projected.shape[:2], width), projected.dtype) if out is None else out
    _batch((projected,), result, (conv, delta), read_slots, write_slots, one)
    return result, conv, delta


def _batch(sequence: Sequence[Array], out: Array, pools: Sequence[Array], reads: Array, writes: Array, one: Step) -> None:
    """``one`` token after the other of all sequences at once; or, in large slots of their own, of one sequence after the other."""
    seqs, tokens = len(reads), out.shape[1]
    batch = [x.reshape(seqs, tokens // seqs, *x.shape[2:]) for x in (*sequence, out)]
    if _own_slots(pools[-1], reads, writes):
        for row, slot in enumerate(reads.tolist()):
            *inputs, result = (x[row : row + 1] for x in batch)
            held = [pool[slot : slot + 1] for pool in pools]
            result[...], *states = one(*inputs, *held)
            for old, new in zip(held, states, strict=True):
                if new is not old:
                    old[...] = new
        return
    states = [_read(pool, reads) for pool in pools]
    for token in range(tokens // seqs):
        *inputs, result = (x[:, token : token + 1] for x in batch)
        result[...], *states = one(*inputs, *states)
        slots = writes[token :: tokens // seqs]
        kept = slots >= 0
        for pool, state in zip(pools, states, strict=True):
            pool[slots[kept]] = state if kept.all() else state[kept]


def _own_slots(pool: Array, reads: Array, writes: Array) -> bool:
    """Whether every sequence has one token and a large slot for itself, which it reads and writes."""
    if pool[0].nbytes < IN_PLACE or len(reads) != len(writes):
        return False
    return bool((reads == writes).all() and (reads >= 0).all())


def _one_by_one(
    sequence: Sequence[Array],
    out: Array,
    pool: Array,
    reads: Array,
    writes: Array,
    starts: Array,
    one: Step,
    many: Step,
) -> None:
    """``one`` or ``many`` tokens of each sequence after the other, up to the next that writes its state."""
    states = _read(pool, reads)
    bounds, slots = sequence_bounds(out.shape[1], len(reads), starts), writes.tolist()
    for row, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        state: Any = states[row : row + 1]
        for piece in pieces(start, stop, slots):
            now = slice(piece.start, piece.stop)
            step = one if piece.stop - piece.start == 1 else many
            out[:, now], state = step(*(x[:, now] for x in sequence), state)
            if piece.slot >= 0:
                pool[piece.slot] = state[0]
    out[:, bounds[-1] :] = 0


def _read(pool: Array, slots: Array) -> Array:
    """A copy of the states in ``slots``; zeros for a sequence that starts."""
    states: Array = pool[slots]
    states[slots < 0] = 0
    return states
