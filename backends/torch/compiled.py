"""Kernels for compiled segments.

``torch.compile`` must not look into what depends on data: how many entries a cache holds, which experts a token chose, how many
chunks a sequence has. Each of these is a custom op of the namespace ``deltaloom`` that declares what it writes in place.
"""

from __future__ import annotations

import torch

from deltaloom.backends.torch.attention import append_and_attend
from deltaloom.backends.torch.bags import settle
from deltaloom.backends.torch.delta_rule import advance
from deltaloom.backends.torch.linear import product as product_now
from deltaloom.backends.torch.moe import mix_experts as mix_now
from deltaloom.backends.torch.table import wide
from deltaloom.graph.op import Op
from deltaloom.ops.attention import Attention
from deltaloom.ops.convolution import CausalConv1d
from deltaloom.ops.delta_rule import GatedDeltaRule
from deltaloom.ops.padding import MaskPadding
from deltaloom.passes.kernel import Appended, KernelTable, is_param

table = KernelTable("inductor")


@torch.library.custom_op("deltaloom::product", mutates_args=())
def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = product_now(x, weight)
    settle(x.device)
    return y


@_product.register_fake
def _product_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] times weight [in, out]. Of one token as a custom op: torch would make loops of its own, which read a weight of
    1024 x 32768 in 7.8 ms, where the custom op takes 2.7."""
    if x.dim() > 1 and x.shape[-2] > 1:
        return torch.nn.functional.linear(x, weight.t())
    out: torch.Tensor = _product(x, weight)
    return out


@table.kernel("linear", when=(is_param("weight"),), wants={"weight": (1, 0)})
def linear(op: Op, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The weight comes stored ``[in, out]``."""
    y = product(x, weight)
    return y if bias is None else y + bias


@torch.library.custom_op("deltaloom::attention", mutates_args=("keys", "values"))
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    return append_and_attend(q, k, v, keys, values, int(length), valid, scale)


@_attention.register_fake
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@table.kernel("attention")
def attention(
    op: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: Appended,
    value_cache: Appended,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """The length is a tensor, so that it is never a constant of the compiled code."""
    return attend(q, k, v, key_cache, value_cache, valid, op.scale)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: Appended,
    value_cache: Appended,
    valid: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The custom op."""
    out: torch.Tensor = _attention(q, k, v, key_cache.data, value_cache.data, key_cache.length, valid, scale)
    return out


@torch.library.custom_op("deltaloom::gated_delta_rule", mutates_args=("state",))
def _gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return advance(q, k, v, log_decay, beta, state, scale).contiguous()


@_gated_delta_rule.register_fake
def _gated_delta_rule_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return v.new_empty(v.shape)


@table.kernel("gated_delta_rule")
def gated_delta_rule(
    op: GatedDeltaRule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state is updated in place."""
    return _gated_delta_rule(q, k, v, log_decay, beta, state, op.scale), state


@torch.library.custom_op("deltaloom::moe_experts", mutates_args=())
def _moe_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    mixed = mix_now(x, weights, ids, gate_up, down).contiguous()
    settle(x.device)
    return mixed


@_moe_experts.register_fake
def _moe_experts_fake(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return x.new_empty(x.shape)


@table.kernel(
    "moe_experts",
    when=(is_param("gate_up"), is_param("down")),
    wants={"gate_up": (0, 2, 1), "down": (0, 2, 1)},
)
def moe_experts(
    op: Op, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Expert weights come as ``[experts, in, out]``."""
    return mix_experts(x, weights, ids, gate_up, down)


def mix_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The custom op."""
    out: torch.Tensor = _moe_experts(x, weights, ids, gate_up, down)
    return out


@table.kernel("causal_conv1d", when=(is_param("weight"),), wants={"weight": (2, 1, 0)})
def causal_conv1d(
    op: CausalConv1d, x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The taps as one sum, which the compiler fuses. The weight comes as ``[taps, 1, channels]``; the state is shifted in place."""
    seq = x.shape[1]
    rows = torch.cat((state.transpose(1, 2), x), 1)
    y = wide(rows[:, :seq]) * weight[0]
    for tap in range(1, weight.shape[0]):
        y = y + wide(rows[:, tap : tap + seq]) * weight[tap]
    state.copy_(rows[:, seq:].transpose(1, 2))
    y = y.to(x.dtype)
    return (torch.nn.functional.silu(y) if op.activation == "silu" else y), state


@table.kernel("mask_padding")
def mask_padding(op: MaskPadding, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Columns by index: whether a slice of the mask is contiguous depends on the past, and torch would compile for each answer."""
    seq = x.shape[1]
    columns = torch.arange(seq, device=x.device) + (valid.shape[1] - seq)
    now = valid.index_select(1, columns)
    return x.masked_fill(~now[(..., *[None] * (x.dim() - 2))], 0)
