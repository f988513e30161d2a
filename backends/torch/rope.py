"""Heads of the torch backend made ready for attention: normed by head, then rotated."""

from __future__ import annotations

import torch

from deltaloom.backends.torch.norm import normed
from deltaloom.backends.torch.table import table
from deltaloom.ops.fused_attention import QKVNormRope


@table.kernel("qkv_norm_rope")
def qkv_norm_rope(
    op: QKVNormRope,
    projected: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """q and k are new tensors, v and gate views of ``projected``."""
    width = q_weight.shape[0]
    q, *gate, k, v = torch.split(projected, list(op.sizes(width)), -1)
    q, k, v = (torch.unflatten(x, -1, (-1, width)) for x in (q, k, v))
    cos, sin = cos[:, :, None], sin[:, :, None]
    q = _rotated(normed(q, q_weight, op.eps, zero_centred=op.zero_centred), cos, sin)
    k = _rotated(normed(k, k_weight, op.eps, zero_centred=op.zero_centred), cos, sin)
    return q, k, v, *gate


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``rope`` of x [batch, seq, heads, width] in place; cos and sin [batch, seq, 1, half]."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return x
