"""Matrix products of the torch backend.

Measured (two cores, float32): for a single row one thread reads the weight, at 26 GB/s where it is stored ``[in, out]`` and at 20
where it is stored ``[out, in]``. As a batch of products over parts of ``in``, one a thread, it comes at 38 to 48 GB/s, and 2 to
32 rows take 0.5 to 0.9 of the time; from 128 rows on both ways are level.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from deltaloom.backends.torch.table import table
from deltaloom.graph.op import Op
from deltaloom.passes.kernel import is_param

FEW = 64
"""Rows up to which a product is cut into parts."""

PART = 64
"""Elements of ``in`` that a part has at least."""


@table.kernel("linear", when=(is_param("weight"),), wants={"weight": (1, 0)})
def linear_packed(op: Op, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The weight comes stored ``[in, out]``."""
    y = product(x, weight, threads=threads_for(x))
    return y if bias is None else y + bias


def threads_for(x: torch.Tensor) -> int:
    """Among how many threads a product with the rows of x is cut."""
    return torch.get_num_threads() if x.numel() <= FEW * x.shape[-1] else 1


def product(x: torch.Tensor, weight: torch.Tensor, *, threads: int) -> torch.Tensor:
    """x [..., in] times weight [in, out], cut among ``threads`` where that pays."""
    width, columns = weight.shape
    count = parts(x, width, threads)
    if count == 1:
        return linear(x, weight.t())
    cut = x.reshape(-1, count, width // count).transpose(0, 1)
    return torch.bmm(cut, torch.unflatten(weight, 0, (count, -1))).sum(0).view(*x.shape[:-1], columns)


def parts(x: torch.Tensor, width: int, threads: int) -> int:
    """Into how many equal parts ``width`` is cut: at most one a thread. Narrow dtypes are not cut: each part would be rounded."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return 1
    for count in range(min(threads, width // PART), 1, -1):
        if width % count == 0:
            return count
    return 1
