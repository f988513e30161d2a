"""Residual sum and RMS norm in one pass.

x, delta, sum and out [rows, d]. Floor: x and delta read, sum and out written, 4 rows d itemsize bytes, and the weight once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.table import WIDEST, at_most, floats, power, table
from deltaloom.ops.fused_norm import AddRMSNorm


@triton.jit
def _add_rms_norm(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
    LIFTED: tl.constexpr,
) -> None:
    at = tl.arange(0, WIDTH)
    inside = at < width
    place = tl.program_id(0).to(tl.int64) * width + at
    w = tl.load(weight + at, inside, other=0.0).to(tl.float32)
    both = tl.load(x + place, inside, other=0.0).to(tl.float32) + tl.load(delta + place, inside, other=0.0).to(tl.float32)
    kept = both.to(total.dtype.element_ty)
    f = kept.to(tl.float32)
    n = f * tl.rsqrt(tl.sum(f * f, 0) / width + eps)
    y = n * w if LIFTED else n.to(out.dtype.element_ty).to(tl.float32) * w
    tl.store(total + place, kept, inside)
    tl.store(out + place, y.to(out.dtype.element_ty), inside)


@table.kernel("add_rms_norm", when=(floats("x"), at_most("x", -1, WIDEST)))
def add_rms_norm(op: AddRMSNorm, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One program a row, which it holds in registers."""
    width = x.shape[-1]
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    warps = min(8, max(1, power(width) // 256))
    grid = (x.numel() // width,)
    _add_rms_norm[grid](x, delta, weight, total, out, op.eps, width, WIDTH=power(width), LIFTED=op.zero_centred, num_warps=warps)
    return total, out
