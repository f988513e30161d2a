"""Attention of one new token a sequence over its blocks of keys and values, split over positions, with the output gate.

q [1, tokens, Hq, D], k, v [1, tokens, Hkv, D], gate [1, tokens, Hq D], pools [blocks, Hkv, block, D]. Floor: keys and values of all
positions read once, 4 Hkv D bytes a position in bfloat16 (2 kB for the 80B). Two launches: ``_split`` has a program for a part of
the positions of a sequence's kv head, which serves all query heads of that head as one tile; ``_merge`` joins the parts and
multiplies with sigmoid(gate). The new key and value are written by the program of the last part, and taken from where they come
from: nobody reads what it writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.table import at_most, floats, interpreted, power, table, tokens_of
from deltaloom.graph.ir import Node
from deltaloom.ops.gated_paged_attention import GatedPagedAttention
from deltaloom.ops.serving import tokens_each
from deltaloom.passes.kernel import absent

PROGRAMS = 528
"""Programs that keep a device of 132 multiprocessors busy."""

SHORTEST = 32
"""Positions of a tile; a part has at least as many."""


def one_token(node: Node) -> str | None:
    """Every sequence must have one token."""
    names = node.op.input_names()
    tokens, seqs = (node.inputs[names.index(name)].type.shape[axis] for name, axis in (("q", 1), ("context_lengths", 0)))
    each = tokens_each(tokens, seqs)
    return None if each == 1 else f"every sequence has {each} tokens, and this kernel takes one step"


@triton.jit
def _split(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    sums: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    columns: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Unnormalised sums [GROUP, D], peaks and totals of one part."""
    seq, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    past = tl.load(contexts + seq)
    count = past + 1
    length = tl.cdiv(tl.cdiv(count, splits), TILE) * TILE
    first = part * length
    last = tl.minimum(first + length, count)
    number, at = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    real, inside = number < GROUP, at < D
    slot = (seq * KV_HEADS + head) * splits + part
    out = slot * GROUP + number
    if first >= count:
        tl.store(peaks + out, tl.zeros([QUERIES], tl.float32) - float("inf"), real)
        tl.store(totals + out, tl.zeros([QUERIES], tl.float32), real)
    else:
        queries = q + seq * q_stride + (head * GROUP + number[:, None]) * D + at[None, :]
        query = tl.load(queries, real[:, None] & inside[None, :], other=0.0)
        new_key = tl.load(k + seq * k_stride + head * D + at, inside, other=0.0)
        new_value = tl.load(v + seq * v_stride + head * D + at, inside, other=0.0)
        peak = tl.zeros([QUERIES], tl.float32) - float("inf")
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(first, last, TILE):
            position = start + tl.arange(0, TILE)
            old = position < past
            block = tl.load(tables + seq * columns + position // BLOCK, old, other=0).to(tl.int64)
            place = ((block * KV_HEADS + head) * BLOCK + position % BLOCK) * D
            is_new = position == past
            keys = tl.load(key_pool + place[:, None] + at[None, :], old[:, None] & inside[None, :], other=0.0)
            keys = tl.where(is_new[:, None], new_key[None, :], keys)
            values = tl.load(value_pool + place[:, None] + at[None, :], old[:, None] & inside[None, :], other=0.0)
            values = tl.where(is_new[:, None], new_value[None, :], values)
            if WIDEN:
                scores = tl.dot(query.to(tl.float32), tl.trans(keys.to(tl.float32)), input_precision="ieee")
            else:
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
            scores = tl.where((position <= past)[None, :], scores * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            weight = tl.exp(scores - higher[:, None])
            fade = tl.exp(peak - higher)
            total = total * fade + tl.sum(weight, 1)
            if WIDEN:
                added = tl.dot(weight, values.to(tl.float32), input_precision="ieee")
            else:
                added = tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            mixed = mixed * fade[:, None] + added
            peak = higher
        tl.store(peaks + out, peak, real)
        tl.store(totals + out, total, real)
        tl.store(sums + out[:, None] * D + at[None, :], mixed, real[:, None] & inside[None, :])
        if last == count:
            block = tl.load(tables + seq * columns + past // BLOCK).to(tl.int64)
            place = ((block * KV_HEADS + head) * BLOCK + past % BLOCK) * D + at
            tl.store(key_pool + place, new_key, inside)
            tl.store(value_pool + place, new_value, inside)


@triton.jit
def _merge(
    sums: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One query head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype = out.dtype.element_ty
    part, at = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = at < D
    slot = ((token * (HEADS // GROUP) + head // GROUP) * splits + part) * GROUP + head % GROUP
    peak = tl.load(peaks + slot, part < splits, other=float("-inf"))
    weight = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(weight * tl.load(totals + slot, part < splits, other=0.0), 0)
    known = (weight > 0.0)[:, None] & inside[None, :]
    values = tl.load(sums + slot[:, None] * D + at[None, :], known, other=0.0)
    y = (tl.sum(values * weight[:, None], 0) / total).to(dtype).to(tl.float32)
    g = tl.load(gate + token * gate_stride + head * D + at, inside, other=0.0).to(tl.float32)
    y = y * (1.0 / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(out + (token * HEADS + head) * D + at, y.to(dtype), inside)


@table.kernel("gated_paged_attention", when=(absent("query_starts"), one_token, floats("q"), at_most("q", -1, 256)))
def gated_paged_attention(
    op: GatedPagedAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many parts there are follows from the size of the tables alone, so that a recorded step serves any lengths."""
    tokens, heads, width = q.shape[1:]
    kv_heads, block, columns = key_pool.shape[1], key_pool.shape[2], block_tables.shape[1]
    group = heads // kv_heads
    splits = max(1, min(triton.cdiv(columns * block, SHORTEST), triton.cdiv(PROGRAMS, tokens * kv_heads), 128))
    sums = torch.empty(tokens * kv_heads * splits * group, width, dtype=torch.float32, device=q.device)
    peaks, totals = sums.new_empty(2, sums.shape[0])
    out = q.new_empty(1, tokens, heads * width)
    (q, q_stride), (k, k_stride), (v, v_stride), (gate, gate_stride) = map(tokens_of, (q, k, v, gate))
    _split[(tokens, kv_heads, splits)](
        q,
        k,
        v,
        key_pool,
        value_pool,
        block_tables,
        context_lengths,
        sums,
        peaks,
        totals,
        op.scale,
        q_stride,
        k_stride,
        v_stride,
        columns,
        splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=width,
        BLOCK=block,
        QUERIES=max(16, power(group)),
        WIDTH=max(16, power(width)),
        TILE=SHORTEST,
        WIDEN=interpreted(),
        num_warps=4,
        num_stages=3 if q.element_size() == 2 else 2,
    )
    _merge[(tokens, heads)](
        sums,
        peaks,
        totals,
        gate,
        out,
        gate_stride,
        splits,
        HEADS=heads,
        GROUP=group,
        D=width,
        WIDTH=power(width),
        PARTS=power(splits),
        num_warps=4,
    )
    return out, key_pool, value_pool
