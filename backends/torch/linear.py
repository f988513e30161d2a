"""Matrix products of the torch backend.

Measured (two cores, float32): MKL's product of few rows reads the weight with one thread. As a batch of products over parts of
``in``, one a thread, 2 to 32 rows take 0.5 to 0.9 of the time; from 128 rows on both ways are level. For one row see ``bags.py``.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from deltaloom.backends.torch import bags
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
    y = product(x, weight)
    return y if bias is None else y + bias


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] times weight [in, out], contiguous, in the way that is fast for the number of rows."""
    if bags.serves(x):
        return bags.row_product(x, weight)
    if x.numel() <= FEW * x.shape[-1]:
        return in_parts(x, weight, torch.get_num_threads())
    return linear(x, weight.t())


def in_parts(x: torch.Tensor, weight: torch.Tensor, threads: int) -> torch.Tensor:
    """x [..., in] times weight [in, out] as the sum of products of parts of ``in``, one a thread if that many are possible."""
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
