"""Weights that are quantised, or in bfloat16, in compiled segments.

Experts are a custom op: ``torch.compile`` must not look into what a token chose. A quantised ``linear`` needs no kernel: its
portable rule dequantises, and the compiler sees the arithmetic. One row times weights in bfloat16 is written out as a sum of
products, which the compiler makes a loop that reads each weight once and widens it in registers: 0.29 ms for 1024 x 6176, where
a product in float32 takes 0.48 and widening before it 1.5. Sums are in float32, and x is not rounded.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from deltaloom.backends.torch.compiled import table
from deltaloom.backends.torch.host import torch_dtype
from deltaloom.backends.torch.quantized import mix_quantised
from deltaloom.backends.torch.swiglu import swiglu
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import CODES, QuantType, dtype_named, f32
from deltaloom.passes.kernel import dtype_in, some_stored_otherwise, weights_in_bfloat16

IN_BFLOAT16 = (dtype_in("x", f32), weights_in_bfloat16)
"""What the kernels with loops can run."""


def _one_row(x: torch.Tensor) -> bool:
    """Whether x [..., in] is one row on a CPU, as the compiler knows: it makes code of its own for sizes of one."""
    return x.device.type == "cpu" and all(size == 1 for size in x.shape[:-1])


def _row_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] times weight [..., out, in]."""
    return (weight.to(x.dtype) * x[..., None, :]).sum(-1)


@table.kernel("linear", when=IN_BFLOAT16, quantised=True)
def bfloat16_linear(op: Op, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One row in a loop; more with the weight widened."""
    y = _row_product(x, weight) if _one_row(x) else linear(x, weight.to(x.dtype))
    return y if bias is None else y + bias


@torch.library.custom_op("deltaloom::quantised_moe_experts", mutates_args=())
def _experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    gate_up_block: list[int],
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    down_block: list[int],
) -> torch.Tensor:
    first = _joined(gate_up, gate_up_scale, gate_up_block, x.shape[2])
    return mix_quantised(x, weights, ids, first, _joined(down, down_scale, down_block, gate_up.shape[1] // 2)).contiguous()


@_experts.register_fake
def _experts_fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    gate_up_block: list[int],
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    down_block: list[int],
) -> torch.Tensor:
    return x.new_empty(x.shape)


@table.kernel("moe_experts", when=IN_BFLOAT16, quantised=True)
def bfloat16_moe_experts(
    op: Op, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The chosen experts of one token in loops that read them where they lie; more tokens in the custom op."""
    if not _one_row(x):
        return quantised_moe_experts(op, x, weights, ids, gate_up, down)
    chosen = ids.flatten()
    inner = swiglu(_row_product(x[0], gate_up[chosen]))
    return (weights.mT * _row_product(inner, down[chosen])).sum(-2, keepdim=True)


@table.kernel("moe_experts", when=(some_stored_otherwise,), quantised=True)
def quantised_moe_experts(
    op: Op,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: QuantizedArray | torch.Tensor,
    down: QuantizedArray | torch.Tensor,
) -> torch.Tensor:
    """The eager kernel as one custom op; codes and scales go in as tensors."""
    out: torch.Tensor = _experts(x, weights, ids, *_taken_apart(gate_up), *_taken_apart(down))
    return out


def _taken_apart(weight: QuantizedArray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Codes, scales, and rows and columns of a block (0: all columns)."""
    if isinstance(weight, QuantizedArray):
        rows, columns = weight.form.block
        return weight.data, weight.scale, [rows, 0 if columns is None else columns]
    return weight, None, []


def _joined(data: torch.Tensor, scale: torch.Tensor | None, block: list[int], columns: int) -> QuantizedArray | torch.Tensor:
    """The weight ``[experts, rows, columns]`` of its parts."""
    if scale is None:
        return data
    storage = next(code for code in CODES.values() if torch_dtype(QuantType(code, (1, None), f32).stored) == data.dtype)
    form = QuantType(storage, (block[0], block[1] or None), dtype_named(str(scale.dtype).removeprefix("torch.")))
    return QuantizedArray(data, scale, form, (data.shape[0], data.shape[1], columns))
