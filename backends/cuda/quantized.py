"""Weights as kernels of this folder take them: in the dtype of x, or as FP8 with a scale a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.graph.ir import Node
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, f8_e4m3, f32
from deltaloom.passes.kernel import Guard, input_type

BLOCK = 128
"""Rows and columns of a block that kernels take; the form in which checkpoints hold FP8."""


def plain_or_fp8(*names: str) -> Guard:
    """The weights must all be in the dtype of x, or all FP8 with a float32 scale for each 128 x 128."""

    def guard(node: Node) -> str | None:
        types = [input_type(node, name) for name in names]
        x = node.inputs[0].type.dtype
        if all(type_.dtype == x for type_ in types):
            return None
        for name, type_ in zip(names, types):
            form = type_.dtype
            if not isinstance(form, QuantType) or (form.storage, form.scale, form.block) != (f8_e4m3, f32, (BLOCK, BLOCK)):
                return f"{name} is {form}, and this kernel takes {x} as x, or FP8 with a float32 scale for each 128 x 128"
        return None

    return guard


def whole_blocks(name: str, axis: int, of: int = BLOCK) -> Guard:
    """Where a weight is quantised, an axis must be a multiple of ``of``, so that no tile has two scales."""

    def guard(node: Node) -> str | None:
        type_ = input_type(node, name)
        size = type_.shape[axis]
        if not isinstance(type_.dtype, QuantType) or (isinstance(size, int) and size % of == 0):
            return None
        return f"axis {axis} of {name} is {size}, no multiple of {of}, so that a tile would have two scales"

    return guard


def parts(weight: torch.Tensor | QuantizedArray) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight; of a plain one the weight itself, twice, since a kernel does not look at the second."""
    return (weight.data, weight.scale) if isinstance(weight, QuantizedArray) else (weight, weight)


@triton.jit
def weights_times_rows(w: tl.tensor, f: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """Weights [ROWS, WIDTH] times rows [WIDTH, TILE]. Codes are widened by way of float32, which a device does in packs."""
    if WIDEN:
        return tl.dot(w.to(tl.float32), f.to(tl.float32), input_precision="ieee")
    if w.dtype != f.dtype:
        w = w.to(tl.float32).to(f.dtype)
    return tl.dot(w, f, input_precision="ieee")
