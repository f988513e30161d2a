"""Routing and experts of the torch backend. Expert weights are never gathered: a token's experts are read where they lie."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from deltaloom.backends.torch.table import table, wide
from deltaloom.graph.op import Op
from deltaloom.ops.moe import RouterTopK
from deltaloom.passes.kernel import is_param

SORT_ROWS = 8
"""Tokens up to which a full stable sort is the faster way to the top k."""


@table.kernel("router_topk")
def router_topk(op: RouterTopK, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ties go to the lowest id, which ``torch.topk`` does not promise; so float32 bits and id make one integer key."""
    f = wide(logits)
    if f.dtype == torch.float64 or f.shape[0] * f.shape[1] <= SORT_ROWS:
        ids = f.sort(dim=-1, descending=True, stable=True).indices[..., : op.k]
    else:
        ids = _topk_by_key(f, op.k)
    weights = torch.softmax(f, -1).gather(-1, ids)
    if op.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), ids.int()


def _topk_by_key(f: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest of the last axis of float32, ties lowest id first. Negative floats sort by their flipped low bits."""
    bits = (f + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = f.shape[-1] - 1
    keys = (ordered << 32) | torch.arange(last, -1, -1, device=f.device)
    return last - (torch.topk(keys, k, dim=-1).values & 0xFFFFFFFF)


@table.kernel(
    "moe_experts",
    when=(is_param("gate_up"), is_param("down")),
    wants={"gate_up": (0, 2, 1), "down": (0, 2, 1)},
)
def moe_experts(
    op: Op, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Expert weights come as ``[experts, in, out]``: 1.4 times faster for few rows, level at 64 rows an expert."""
    return mix_experts(x, weights, ids, gate_up, down)


def mix_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """x [batch, seq, H], weights and ids [batch, seq, k], gate_up [E, H, 2 I], down [E, I, H]."""
    rows, k = x.reshape(-1, x.shape[-1]), ids.shape[-1]
    run = _one_token if len(rows) == 1 else _sorted
    return run(rows, weights.reshape(-1, k), ids.reshape(-1, k), gate_up, down).view(x.shape)


def _one_token(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """A matrix-vector product for each chosen expert."""
    chosen = ids[0].tolist()
    both = x.new_empty(len(chosen), gate_up.shape[2])
    for expert, target in zip(chosen, both.unbind(0)):
        torch.mv(gate_up[expert].t(), x[0], out=target)
    hidden = _swiglu(both)
    results = x.new_empty(len(chosen), down.shape[2])
    for expert, row, target in zip(chosen, hidden.unbind(0), results.unbind(0)):
        torch.mv(down[expert].t(), row, out=target)
    return weights @ results


def _sorted(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Rows sorted by expert, then two products an expert, whose results are added to their tokens in float32. The rows are copied
    an expert at a time: they stay in the cache, and there is no array of all of them."""
    tokens, k = ids.shape
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    owners = torch.split(order // k, counts)
    shares = torch.split(wide(weights).reshape(-1, 1).index_select(0, order), counts)
    sums = torch.zeros(tokens, down.shape[2], dtype=shares[0].dtype, device=x.device)
    for expert, (rows, share) in enumerate(zip(owners, shares)):
        if len(rows):
            hidden = _swiglu(x.index_select(0, rows) @ gate_up[expert])
            sums.index_add_(0, rows, wide(hidden @ down[expert]).mul_(share))
    return sums.to(x.dtype)


def _swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return silu(gate).mul_(up)
