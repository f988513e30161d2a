"""The gated delta net of the torch backend, for one token: convolution, norms, gates, step and gated norm.

For more tokens the parts are as fast on their own.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from deltaloom.backends.torch import convolution, delta_rule
from deltaloom.backends.torch.norm import gated_normed, unit
from deltaloom.backends.torch.table import table
from deltaloom.ops.delta_gates import DeltaGates
from deltaloom.ops.fused_delta_net import GatedDeltaNet
from deltaloom.passes.kernel import is_param, size

GATES = DeltaGates()

ONE_TOKEN = (size("projected", 1, equals=1), is_param("conv_weight"))
"""What the kernel can run."""

WANTS = {"conv_weight": (2, 1, 0)}
"""The layout that the convolution wants too."""


@table.kernel("gated_delta_net", when=ONE_TOKEN, wants=WANTS)
def gated_delta_net(
    op: GatedDeltaNet,
    projected: torch.Tensor,
    conv_weight: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv: torch.Tensor,
    delta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both states are updated in place. The heads of q and k lie side by side, so that one norm serves them."""
    keys, values = op.widths
    batch, heads = projected.shape[0], op.value_heads
    qkv, z, b, a = torch.split(projected, [2 * keys + values, values, heads, heads], -1)
    qk, v = torch.split(silu(convolution.step(qkv, conv_weight, conv)), [2 * keys, values], -1)
    pair = unit(qk.view(batch, 2, op.key_heads, op.key_dim), op.l2_eps)
    pair[:, 0].mul_(op.scale)
    beta, log_decay = GATES.torch(torch, b, a, a_log, dt_bias)
    v = v.view(batch, heads, op.value_dim)
    working = delta.contiguous()
    out = delta_rule.step(pair, v, log_decay[:, 0], beta[:, 0], working).to(v.dtype)
    if working is not delta:
        delta.copy_(working)
    out = gated_normed(out, z.view(batch, heads, op.value_dim), norm_weight, op.eps)
    return out.view(batch, 1, values), conv, delta
