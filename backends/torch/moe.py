"""Routing and experts of the torch backend. On a CPU a token's experts are read where they lie, never gathered."""

from __future__ import annotations

import torch

from deltaloom.backends.torch.bags import chosen_products, settle
from deltaloom.backends.torch.linear import product
from deltaloom.backends.torch.swiglu import swiglu
from deltaloom.backends.torch.table import table, wide
from deltaloom.graph.op import Op
from deltaloom.ops.fused_moe import GatedRouter
from deltaloom.ops.moe import RouterTopK
from deltaloom.passes.kernel import is_param

SORT_ROWS = 8
"""Tokens up to which a full stable sort is the faster way to the top k."""

BAG_ROWS = 16
"""Tokens up to which experts are read token by token: with 16 in 0.5 of the time that sorting takes, with 32 in more."""


@table.kernel("router_topk")
def router_topk(op: RouterTopK, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ties go to the lowest id."""
    return _route(logits, op.k, normalize=op.normalize)


@table.kernel("gated_router")
def gated_router(op: GatedRouter, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gate is a view of the last column."""
    return *_route(logits[..., :-1], op.k, normalize=op.normalize), logits[..., -1:]


def _route(logits: torch.Tensor, k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    f = wide(logits)
    by_sort = f.dtype == torch.float64 or f.shape[0] * f.shape[1] <= SORT_ROWS
    ids = top_by_sort(f, k) if by_sort else _topk_by_key(f, k)
    return shares(f, ids, normalize=normalize).to(logits.dtype), ids.int()


def top_by_sort(f: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest of the last axis, ties lowest id first."""
    return f.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def shares(f: torch.Tensor, ids: torch.Tensor, *, normalize: bool) -> torch.Tensor:
    """The softmax of f at ``ids``, divided by its sum if asked."""
    weights = torch.softmax(f, -1).gather(-1, ids)
    return weights / weights.sum(-1, keepdim=True) if normalize else weights


def _topk_by_key(f: torch.Tensor, k: int) -> torch.Tensor:
    """Ids of the k largest of the last axis of float32, ties lowest id first, which ``torch.topk`` alone does not promise: bits
    and id make one integer key. Negative floats sort by their flipped low bits."""
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


SHARED = tuple(map(is_param, ("gate_up", "down", "shared_gate_up", "shared_down")))
"""What the kernels of ``shared_moe`` can run."""

SHARED_WANTS = {"gate_up": (0, 2, 1), "down": (0, 2, 1), "shared_gate_up": (1, 0), "shared_down": (1, 0)}
"""Every weight as ``[in, out]``."""


@table.kernel("shared_moe", when=SHARED, wants=SHARED_WANTS)
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
    """The shared expert's part is added to that of the others in place."""
    shared = product(swiglu(product(x, shared_gate_up)), shared_down)
    return mix_experts(x, weights, ids, gate_up, down).add_(shared.mul_(torch.sigmoid(gate)))


def mix_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """x [batch, seq, H], weights and ids [batch, seq, k], gate_up [E, H, 2 I], down [E, I, H]; the result is a new tensor."""
    rows, k = x.reshape(-1, x.shape[-1]), ids.shape[-1]
    run = _token_by_token if len(rows) <= (BAG_ROWS if x.device.type == "cpu" else 1) else _sorted
    return run(rows, weights.reshape(-1, k), ids.reshape(-1, k), gate_up, down).view(x.shape)


def _token_by_token(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Every chosen expert of every token by itself, without asking the host which these are."""
    tokens, k = ids.shape
    chosen = ids.reshape(-1)
    inputs = x[:, None].expand(tokens, k, x.shape[1]).reshape(tokens * k, x.shape[1])
    hidden = swiglu(chosen_products(inputs, chosen, gate_up))
    results = chosen_products(hidden, chosen, down).view(tokens, k, -1)
    if tokens > 1:
        settle(x.device)
    return torch.bmm(weights[:, None], results)[:, 0]


def _sorted(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
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
            hidden = swiglu(x.index_select(0, rows) @ gate_up[expert])
            sums.index_add_(0, rows, wide(hidden @ down[expert]).mul_(share))
    return sums.to(x.dtype)
