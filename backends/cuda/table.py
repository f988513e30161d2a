"""The table that the kernel files of this folder fill, and what their launches share."""

from __future__ import annotations

import os
from functools import cache

import torch
from triton import next_power_of_2

from deltaloom.graph.ir import Node
from deltaloom.graph.types import DType, bf16, f16, f32
from deltaloom.passes.kernel import Guard, KernelTable, dtype_in

table = KernelTable("cuda")

FLOATS: tuple[DType, ...] = (f32, bf16, f16)
"""The dtypes of activations; sums are float32."""

WIDEST = 16384
"""Numbers of a row that one program holds."""


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU. Its ``tl.dot`` of bfloat16 is wrong, so kernels widen for it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def power(number: int) -> int:
    """The least power of two that is not below ``number``; Triton's blocks have such sizes."""
    return int(next_power_of_2(max(1, number)))


def floats(name: str) -> Guard:
    """An input must be float32, bfloat16 or float16."""
    return dtype_in(name, *FLOATS)


def at_most(name: str, axis: int, limit: int) -> Guard:
    """An axis of an input must be known and no longer than ``limit``."""

    def guard(node: Node) -> str | None:
        found = node.inputs[node.op.input_names().index(name)].type.shape[axis]
        return None if isinstance(found, int) and found <= limit else f"axis {axis} of {name} is {found}, above {limit}"

    return guard


def tokens_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [1, tokens, ...] with the numbers of each token side by side, and the distance from token to token."""
    flat = x.view(x.shape[0], x.shape[1], -1) if x[0, 0].is_contiguous() else x.contiguous().view(x.shape[0], x.shape[1], -1)
    return flat, flat.stride(1)


@cache
def zeros(device: torch.device, count: int) -> torch.Tensor:
    """``count`` zeros, which every launch leaves as zeros; launches of one device that share them run one after the other."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device=device)
