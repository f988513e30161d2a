"""Serving forms of the torch backend: the kernels of the base ops, as a batch where all sequences have as many tokens, else one
sequence after the other. Pools are written in place; states that a step reads are copied before anything is written.

The lengths of sequences are needed on the host, so that on a GPU a step waits for them once a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from deltaloom.backends.torch.attention import append_and_attend
from deltaloom.backends.torch.convolution import causal_conv1d
from deltaloom.backends.torch.delta_net import gated_delta_net
from deltaloom.backends.torch.delta_rule import advance
from deltaloom.backends.torch.table import table
from deltaloom.ops.packed_convolution import PackedCausalConv1d
from deltaloom.ops.packed_delta_net import PackedGatedDeltaNet
from deltaloom.ops.packed_delta_rule import PackedGatedDeltaRule
from deltaloom.ops.paged_attention import PagedAttention
from deltaloom.ops.serving import pieces, sequence_bounds
from deltaloom.passes.kernel import absent, is_param

Run = Callable[..., torch.Tensor]
"""Inputs [sequences, tokens, ...] and states, which are changed in place -> the output."""


@table.kernel("paged_attention")
def paged_attention(
    op: PagedAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    query_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks of a sequence are put side by side, with room for the new entries, which the base kernel appends and reads."""
    bounds, size = sequence_bounds(q.shape[1], len(context_lengths), query_starts), key_pool.shape[2]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for row, past, start, stop in zip(range(len(bounds)), context_lengths.tolist(), bounds, bounds[1:]):
        if start == stop:
            continue
        end = past + stop - start
        blocks = block_tables[row, : -(-end // size)]
        keys, values = (pool[blocks].transpose(0, 1).flatten(1, 2)[None] for pool in (key_pool, value_pool))
        query, key, value = (x[:, start:stop] for x in (q, k, v))
        out[:, start:stop] = append_and_attend(query, key, value, keys, values, past, None, op.scale)
        positions = torch.arange(past, end, device=q.device)
        target = blocks[positions // size], slice(None), positions % size
        key_pool[target] = key[0]
        value_pool[target] = value[0]
    return out, key_pool, value_pool


@table.kernel("gated_paged_attention")
def gated_paged_attention(
    op: PagedAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    query_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention, whose result is multiplied in place."""
    layout = (block_tables, context_lengths, query_starts)
    out, _, _ = paged_attention(op, q, k, v, key_pool, value_pool, *layout)
    return out.flatten(2).mul_(torch.sigmoid(gate)), key_pool, value_pool


@table.kernel("packed_causal_conv1d", when=(is_param("weight"),), wants={"weight": (2, 1, 0)})
def packed_causal_conv1d(
    op: PackedCausalConv1d,
    x: torch.Tensor,
    weight: torch.Tensor,
    pool: torch.Tensor,
    read_slots: torch.Tensor,
    write_slots: torch.Tensor,
    query_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel of the base op."""
    one = op.one()

    def run(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(one, x, weight, state)[0]

    out = torch.zeros_like(x)
    _packed((x,), out, (pool,), read_slots, write_slots, query_starts, run)
    return out, pool


@table.kernel("packed_gated_delta_rule")
def packed_gated_delta_rule(
    op: PackedGatedDeltaRule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    pool: torch.Tensor,
    read_slots: torch.Tensor,
    write_slots: torch.Tensor,
    query_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token between two writes: the recurrent form; more: chunks."""
    out, run = torch.zeros_like(v), partial(advance, scale=op.scale)
    _packed((q, k, v, log_decay, beta), out, (pool,), read_slots, write_slots, query_starts, run)
    return out, pool


@table.kernel("packed_gated_delta_net", when=(absent("query_starts"), is_param("conv_weight")), wants={"conv_weight": (2, 1, 0)})
def packed_gated_delta_net(
    op: PackedGatedDeltaNet,
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv: torch.Tensor,
    delta: torch.Tensor,
    read_slots: torch.Tensor,
    write_slots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel of the base op for one token, over all sequences, token by token. Sequences of any length run in parts."""

    def run(x: torch.Tensor, conv: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return gated_delta_net(op, x, conv_weight, a_log, dt_bias, norm_weight, conv, delta)[0]

    out = projected.new_zeros(*projected.shape[:2], op.widths[1])
    _packed((projected,), out, (conv, delta), read_slots, write_slots, None, run)
    return out, conv, delta


def _packed(
    sequence: Sequence[torch.Tensor],
    out: torch.Tensor,
    pools: Sequence[torch.Tensor],
    reads: torch.Tensor,
    writes: torch.Tensor,
    starts: torch.Tensor | None,
    run: Run,
) -> None:
    """Fills ``out`` [1, tokens, ...], which holds zeros, and the written slots of the pools."""
    seqs, tokens = len(reads), out.shape[1]
    states = [pool[reads.clamp(min=0)] for pool in pools]
    for state in states:
        state[reads < 0] = 0
    if starts is None:
        each = tokens // seqs
        batch = [x.reshape(seqs, each, *x.shape[2:]) for x in (*sequence, out)]
        for token in range(each):
            *inputs, result = (x[:, token : token + 1] for x in batch)
            result.copy_(run(*inputs, *states))
            now = writes[token::each]
            for pool, state in zip(pools, states, strict=True):
                pool[now[now >= 0]] = state[now >= 0]
        return
    bounds, slots = sequence_bounds(tokens, seqs, starts), writes.tolist()
    for row, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        held = [state[row : row + 1] for state in states]
        for piece in pieces(start, stop, slots):
            at = slice(piece.start, piece.stop)
            out[:, at] = run(*(x[:, at] for x in sequence), *held)
            if piece.slot >= 0:
                for pool, state in zip(pools, held, strict=True):
                    pool[piece.slot] = state[0]
