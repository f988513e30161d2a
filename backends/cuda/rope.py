"""Heads made ready for attention: q and k normed by head and rotated, in one launch; the angles of a step.

projected [1, tokens, Hq D (+ Hq D) + 2 Hkv D] gives q [1, tokens, Hq, D] and k [1, tokens, Hkv, D]; v and gate stay where they
are. Floor: q and k read and written once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.table import WIDEST, at_most, floats, power, table
from deltaloom.ops.fused_attention import QKVNormRope
from deltaloom.ops.rope import RotaryEmbedding


@triton.jit
def _norm_rope(
    projected: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    eps: tl.tensor,
    stride: tl.tensor,
    k_start: tl.tensor,
    half: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    LIFTED: tl.constexpr,
) -> None:
    """One head of one token. The partner of a number in the rotation is read a second time rather than exchanged."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype = q.dtype.element_ty
    at = tl.arange(0, WIDTH)
    inside = at < D
    turned = at < 2 * half
    other = tl.where(turned, tl.where(at < half, at + half, at - half), at)
    angle = tl.where(at < half, at, at - half)
    is_q = head < HEADS
    own = head - HEADS
    source = projected + token * stride + tl.where(is_q, head * D, k_start + own * D)
    x = tl.load(source + at, inside, other=0.0).to(tl.float32)
    y = tl.load(source + other, inside, other=0.0).to(tl.float32)
    if is_q:
        w = tl.load(q_weight + at, inside, other=0.0).to(tl.float32)
        v = tl.load(q_weight + other, inside, other=0.0).to(tl.float32)
    else:
        w = tl.load(k_weight + at, inside, other=0.0).to(tl.float32)
        v = tl.load(k_weight + other, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    if LIFTED:
        x = (x * scale * w).to(dtype).to(tl.float32)
        y = (y * scale * v).to(dtype).to(tl.float32)
    else:
        x = ((x * scale).to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
        y = ((y * scale).to(dtype).to(tl.float32) * v).to(dtype).to(tl.float32)
    c = tl.load(cos + token * half + angle, inside & turned, other=1.0).to(tl.float32)
    s = tl.load(sin + token * half + angle, inside & turned, other=0.0).to(tl.float32)
    result = (x * c + tl.where(at < half, -y, y) * s).to(dtype)
    if is_q:
        tl.store(q + (token * HEADS + head) * D + at, result, inside)
    else:
        tl.store(k + (token * KV_HEADS + own) * D + at, result, inside)


@table.kernel("qkv_norm_rope", when=(floats("projected"), at_most("q_weight", 0, WIDEST)))
def qkv_norm_rope(
    op: QKVNormRope,
    projected: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """One program a head and token; v and gate are views."""
    batch, seq, _ = projected.shape
    width = q_weight.shape[0]
    sizes = op.sizes(width)
    projected, cos, sin = projected.contiguous(), cos.contiguous(), sin.contiguous()
    q = projected.new_empty(batch, seq, op.heads, width)
    k = projected.new_empty(batch, seq, op.kv_heads, width)
    grid = (batch * seq, op.heads + op.kv_heads)
    _norm_rope[grid](
        projected,
        q_weight,
        k_weight,
        cos,
        sin,
        q,
        k,
        op.eps,
        projected.stride(1),
        sum(sizes[:-2]),
        cos.shape[-1],
        HEADS=op.heads,
        KV_HEADS=op.kv_heads,
        D=width,
        WIDTH=power(width),
        LIFTED=op.zero_centred,
        num_warps=2,
    )
    _, *gate, _, v = torch.split(projected, list(sizes), -1)
    return q, k, torch.unflatten(v, -1, (op.kv_heads, width)), *gate


@table.kernel("rotary_embedding")
def rotary_embedding(op: RotaryEmbedding, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the op's own rule, but the frequencies are on the device already, as a recorded step needs it."""
    angles = positions.to(torch.float32)[..., None] * _frequencies(op.inv_freq, positions.device)
    target: torch.dtype = getattr(torch, op.dtype)
    angles = angles.to(torch.float64) if target == torch.float64 else angles
    return (angles.cos() * op.magnitude).to(target), (angles.sin() * op.magnitude).to(target)


@lru_cache(maxsize=16)
def _frequencies(inv_freq: tuple[float, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(inv_freq, dtype=torch.float32, device=device)
