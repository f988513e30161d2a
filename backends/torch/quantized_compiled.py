"""Experts with quantised weights in compiled segments, as a custom op: ``torch.compile`` must not look into what a token chose.

A quantised ``linear`` needs no kernel here: its portable rule dequantises, and the compiler sees the arithmetic.
"""

from __future__ import annotations

import torch

from deltaloom.backends.torch.compiled import table
from deltaloom.backends.torch.host import torch_dtype
from deltaloom.backends.torch.quantized import mix_quantised
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import CODES, QuantType, dtype_named, f32
from deltaloom.passes.kernel import some_stored_otherwise


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
