"""The table that the kernel files of this folder fill, and the one conversion that they share."""

from __future__ import annotations

import torch

from deltaloom.passes.kernel import KernelTable

table = KernelTable("torch")


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the dtype for sums: float32, or float64 if it is that."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
