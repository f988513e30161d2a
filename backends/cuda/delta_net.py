"""The gated delta net of one token a sequence between its projections, as one launch: convolution, norms, gates, step, gated norm.

projected [1, tokens, 2 Hk dk + 2 Hv dv + 2 Hv] = [q | k | v | z | b | a], pools conv [slots, C, K - 1] and delta [slots, Hv, dk,
dv] float32. Floor: the state of a sequence read and written, 8 Hv dk dv bytes (4.2 MB a layer of the 80B); the rest is under a
hundredth of it. The recurrence is that of ops/delta_rule.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.table import at_most, floats, power, table, zeros
from deltaloom.graph.ir import Node
from deltaloom.graph.types import f32
from deltaloom.ops.packed_delta_net import PackedGatedDeltaNet
from deltaloom.ops.serving import tokens_each
from deltaloom.passes.kernel import absent, dtype_in

ELEMENTS, WARPS = 8192, 2
"""Numbers of the state that a program holds at a time, and its warps."""

FEW, SOME = 4, 32
"""Sequences up to which a program holds half of that, and up to which it has one tile, so that there are many programs; with more
it has all values of a head."""


def one_token(node: Node) -> str | None:
    """Every sequence must have one token."""
    names = node.op.input_names()
    tokens, seqs = (node.inputs[names.index(name)].type.shape[axis] for name, axis in (("projected", 1), ("read_slots", 0)))
    each = tokens_each(tokens, seqs)
    return None if each == 1 else f"every sequence has {each} tokens, and this kernel takes one step"


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _convolved(
    row: tl.tensor,
    weight: tl.tensor,
    conv: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    read: tl.tensor,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
) -> tl.tensor:
    """Channels after the convolution and silu, in float32."""
    dtype = row.dtype.element_ty
    total = tl.load(row + channel, inside, other=0.0).to(tl.float32)
    total *= tl.load(weight + channel * TAPS + (TAPS - 1), inside, other=0.0).to(tl.float32)
    known = tl.where(inside, read, -1) >= 0
    old = (read * CHANNELS + channel) * (TAPS - 1)
    for column in tl.static_range(TAPS - 1):
        w = tl.load(weight + channel * TAPS + column, inside, other=0.0).to(tl.float32)
        total += tl.load(conv + old + column, known, other=0.0).to(tl.float32) * w
    return _silu(total.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _shift(
    row: tl.tensor,
    conv: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    read: tl.tensor,
    write: tl.tensor,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
) -> None:
    """Move the columns of the state of these channels on. A column is written once all threads have read it."""
    known = tl.where(inside, read, -1) >= 0
    kept = tl.where(inside, write, -1) >= 0
    old, new = (read * CHANNELS + channel) * (TAPS - 1), (write * CHANNELS + channel) * (TAPS - 1)
    for column in tl.static_range(TAPS - 1):
        if column < TAPS - 2:
            moved = tl.load(conv + old + column + 1, known, other=0.0)
        else:
            moved = tl.load(row + channel, inside, other=0.0)
        tl.debug_barrier()
        tl.store(conv + new + column, moved, kept)


@triton.jit
def _delta_net(
    projected: tl.tensor,
    conv_weight: tl.tensor,
    a_log: tl.tensor,
    dt_bias: tl.tensor,
    norm_weight: tl.tensor,
    conv: tl.tensor,
    delta: tl.tensor,
    reads: tl.tensor,
    writes: tl.tensor,
    out: tl.tensor,
    raw: tl.tensor,
    done: tl.tensor,
    stride: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    l2_eps: tl.tensor,
    KEY_HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    TAPS: tl.constexpr,
    R: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """STEPS times TILE values of one head of one sequence. Whichever program of a key head ends last norms its value heads and
    moves the convolution's state on, which no other reads any more; it leaves ``done`` at 0 as it found it."""
    tile, own, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype = out.dtype.element_ty
    HEADS: tl.constexpr = KEY_HEADS * REPEATS
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + HEADS * DV
    head = own // REPEATS
    key = tl.arange(0, KEYS)
    is_key = key < DK
    read, write = tl.load(reads + token).to(tl.int64), tl.load(writes + token).to(tl.int64)
    row = projected + token * stride
    q = _convolved(row, conv_weight, conv, head * DK + key, is_key, read, CHANNELS, TAPS)
    k = _convolved(row, conv_weight, conv, (KEY_HEADS + head) * DK + key, is_key, read, CHANNELS, TAPS)
    q = q * tl.rsqrt(tl.sum(q * q, 0) + l2_eps) * scale
    k = k * tl.rsqrt(tl.sum(k * k, 0) + l2_eps)
    shared = tl.sum(q * k, 0)
    gates = row + CHANNELS + HEADS * DV
    a = tl.load(gates + HEADS + own).to(tl.float32) + tl.load(dt_bias + own).to(tl.float32)
    softplus = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    decay = tl.exp(-tl.exp(tl.load(a_log + own).to(tl.float32)) * softplus)
    beta = (1.0 / (1.0 + tl.exp(-tl.load(gates + own).to(tl.float32)))).to(dtype).to(tl.float32)
    result = raw + token * (HEADS * DV)
    for step in tl.static_range(STEPS):
        value = (tile * STEPS + step) * TILE + tl.arange(0, TILE)
        inside = value < DV
        held = is_key[:, None] & inside[None, :]
        place = (own * DK + key[:, None]) * DV + value[None, :]
        S = tl.load(delta + read * (HEADS * DK * DV) + place, tl.where(held, read, -1) >= 0, other=0.0)
        v = _convolved(row, conv_weight, conv, 2 * KEY_HEADS * DK + own * DV + value, inside, read, CHANNELS, TAPS)
        by_key, by_query = tl.sum(S * k[:, None], 0), tl.sum(S * q[:, None], 0)
        change = (v - decay * by_key) * beta
        new = S * decay + k[:, None] * change[None, :]
        tl.store(delta + write * (HEADS * DK * DV) + place, new, tl.where(held, write, -1) >= 0)
        tl.store(result + own * DV + value, (decay * by_query + shared * change).to(dtype), inside)
    tl.debug_barrier()
    counter = done + token * KEY_HEADS + head
    if tl.atomic_add(counter, 1) == TILES * REPEATS - 1:
        number, every = tl.arange(0, R), tl.arange(0, VALUES)
        real = (number < REPEATS)[:, None] & (every < DV)[None, :]
        columns = (head * REPEATS + number)[:, None] * DV + every[None, :]
        o = tl.load(result + columns, real, other=0.0, cache_modifier=".cg").to(tl.float32)
        n = (o * tl.rsqrt(tl.sum(o * o, 1) / DV + eps)[:, None]).to(dtype).to(tl.float32)
        w = tl.load(norm_weight + every, every < DV, other=0.0).to(tl.float32)
        z = tl.load(row + CHANNELS + columns, real, other=0.0).to(tl.float32)
        y = (n * w[None, :]).to(dtype).to(tl.float32) * _silu(z)
        tl.store(out + token * (HEADS * DV) + columns, y.to(dtype), real)
        _shift(row, conv, head * DK + key, is_key, read, write, CHANNELS, TAPS)
        _shift(row, conv, (KEY_HEADS + head) * DK + key, is_key, read, write, CHANNELS, TAPS)
        _shift(row, conv, 2 * KEY_HEADS * DK + columns, real, read, write, CHANNELS, TAPS)
        tl.store(counter, 0)


@table.kernel(
    "packed_gated_delta_net",
    when=(
        absent("query_starts"),
        one_token,
        floats("projected"),
        dtype_in("delta", f32),
        at_most("delta", 2, 256),
        at_most("delta", 3, 256),
    ),
)
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
    """One program for a key head of a sequence. States are read and written in place."""
    tokens, repeats = projected.shape[1], op.value_heads // op.key_heads
    projected = projected.contiguous()
    raw, out = projected.new_empty(2, 1, tokens, op.value_heads * op.value_dim)
    keys, values, r = power(op.key_dim), power(op.value_dim), power(repeats)
    tile = max(1, min(values, (ELEMENTS if tokens > FEW else ELEMENTS // 2) // keys))
    steps = 1 if tokens <= SOME else values // tile
    tiles = triton.cdiv(op.value_dim, tile * steps)
    _delta_net[(tiles, op.value_heads, tokens)](
        projected,
        conv_weight,
        a_log,
        dt_bias,
        norm_weight,
        conv,
        delta,
        read_slots,
        write_slots,
        out,
        raw,
        zeros(projected.device, power(tokens * op.key_heads)),
        projected.stride(1),
        op.scale,
        op.eps,
        op.l2_eps,
        KEY_HEADS=op.key_heads,
        REPEATS=repeats,
        DK=op.key_dim,
        DV=op.value_dim,
        TAPS=conv_weight.shape[2],
        R=r,
        KEYS=keys,
        VALUES=values,
        TILE=tile,
        TILES=tiles,
        STEPS=steps,
        num_warps=WARPS,
    )
    return out, conv, delta
