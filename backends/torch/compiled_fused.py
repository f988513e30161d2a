"""Kernels of the fused ops for compiled segments: the eager ones where these are plain torch, else around the custom ops."""

from __future__ import annotations

import torch

from deltaloom.backends.torch import delta_net, moe, norm, rope, swiglu
from deltaloom.backends.torch.compiled import attend, mix_experts, product, table
from deltaloom.backends.torch.table import wide
from deltaloom.graph.op import Op
from deltaloom.ops.fused_attention import GatedAttention
from deltaloom.ops.fused_moe import GatedRouter
from deltaloom.passes.kernel import Appended

table.kernel("add_rms_norm")(norm.add_rms_norm)
table.kernel("packed_swiglu")(swiglu.packed_swiglu)
table.kernel("qkv_norm_rope")(rope.qkv_norm_rope)
table.kernel("gated_delta_net", when=delta_net.ONE_TOKEN, wants=delta_net.WANTS)(delta_net.gated_delta_net)


@table.kernel("gated_attention")
def gated_attention(
    op: GatedAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    key_cache: Appended,
    value_cache: Appended,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gate is left to the compiler."""
    return attend(q, k, v, key_cache, value_cache, valid, op.scale).flatten(2) * torch.sigmoid(gate)


@table.kernel("gated_router")
def gated_router(op: GatedRouter, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By a sort whatever the number of tokens, on which the code must not depend."""
    f = wide(logits[..., :-1])
    ids = moe.top_by_sort(f, op.k)
    return moe.shares(f, ids, normalize=op.normalize).to(logits.dtype), ids.int(), logits[..., -1:]


@table.kernel("shared_moe", when=moe.SHARED, wants=moe.SHARED_WANTS)
def shared_moe(
    op: Op,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shared_gate_up: torch.Tensor,
    shared_down: torch.Tensor,
) -> torch.Tensor:
    """Routed experts in a custom op, the shared one outside of it."""
    shared = product(swiglu.swiglu(product(x, shared_gate_up)), shared_down)
    return mix_experts(x, weights, ids, gate_up, down) + shared * torch.sigmoid(gate)
