"""Products with weights that are quantised, or in bfloat16, on torch: a tile of rows is widened and multiplied, so that such a
weight never exists as a whole in the dtype of the activations."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from deltaloom.backends.torch.table import table, wide
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.ops.quantized import plain_tensor
from deltaloom.passes.kernel import some_stored_otherwise

TILE = 1 << 20
"""Codes that are dequantised at once (4 MiB of float32)."""


@table.kernel("linear", when=(some_stored_otherwise,), quantised=True)
def quantised_linear(
    op: Op, x: torch.Tensor, weight: QuantizedArray | torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Tile by tile."""
    y = multiply(x, weight)
    return y if bias is None else y.add_(bias)


def multiply(x: torch.Tensor, weight: QuantizedArray | torch.Tensor) -> torch.Tensor:
    """``x [..., i]`` times ``weight [o, i]`` transposed."""
    if isinstance(weight, torch.Tensor) and weight.dtype == x.dtype:
        return linear(x, weight)
    count, width = weight.shape
    unit = weight.form.block[0] if isinstance(weight, QuantizedArray) else 1
    step = max(1, TILE // (width * unit)) * unit
    if step >= count:
        return linear(x, plain_tensor(torch, weight, x.dtype))
    out = x.new_empty(*x.shape[:-1], count)
    for start in range(0, count, step):
        stop = min(start + step, count)
        tile = weight.part(0, start, stop) if isinstance(weight, QuantizedArray) else weight[start:stop]
        out[..., start:stop] = linear(x, plain_tensor(torch, tile, x.dtype))
    return out


@table.kernel("moe_experts", when=(some_stored_otherwise,), quantised=True)
def quantised_moe_experts(
    op: Op,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: QuantizedArray | torch.Tensor,
    down: QuantizedArray | torch.Tensor,
) -> torch.Tensor:
    """Tokens sorted by expert; each expert that somebody chose is dequantised once. One of both weights may be plain."""
    return mix_quantised(x, weights, ids, gate_up, down)


def mix_quantised(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: QuantizedArray | torch.Tensor,
    down: QuantizedArray | torch.Tensor,
) -> torch.Tensor:
    """x [batch, seq, H]; weights, ids [batch, seq, k]; gate_up [E, 2 I, H]; down [E, H, I]."""
    rows, k = x.reshape(-1, x.shape[-1]), ids.shape[-1]
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
    owners = torch.split(order // k, counts)
    shares = torch.split(wide(weights).reshape(-1, 1).index_select(0, order), counts)
    sums = torch.zeros(rows.shape, dtype=shares[0].dtype, device=x.device)
    for expert, (own, share) in enumerate(zip(owners, shares)):
        if len(own):
            gate, up = multiply(rows.index_select(0, own), gate_up[expert]).chunk(2, dim=-1)
            result = multiply(silu(gate).mul_(up), down[expert])
            sums.index_add_(0, own, wide(result).mul(share))
    return sums.to(x.dtype).view(x.shape)
