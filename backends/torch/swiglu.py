"""SwiGLU of the torch backend."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from deltaloom.backends.torch.table import table
from deltaloom.graph.op import Op


@table.kernel("packed_swiglu")
def packed_swiglu(op: Op, both: torch.Tensor) -> torch.Tensor:
    """A new tensor; the halves are not copied."""
    return swiglu(both)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of both = [gate | up] along the last axis."""
    gate, up = both.chunk(2, dim=-1)
    return silu(gate).mul_(up)
