"""NumPy arrays and torch tensors of the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deltaloom.graph.op import Array
from deltaloom.graph.types import DType, bf16, f8_e4m3

SPECIAL: dict[DType, tuple[torch.dtype, torch.dtype]] = {
    bf16: (torch.int16, torch.bfloat16),
    f8_e4m3: (torch.uint8, torch.float8_e4m3fn),
}
"""Dtypes that torch and NumPy cannot exchange directly: the torch dtype that carries their bits, and their own."""


class _Memory:
    """Memory of an array, announced as writable. torch warns about read-only arrays, which mapped files are; whoever gets a
    tensor of a weight or an input does not write it."""

    def __init__(self, array: Array) -> None:
        self._owner = array
        interface: dict[str, Any] = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of a graph dtype."""
    found: torch.dtype = getattr(torch, dtype.long_name)
    return found


def to_tensor(array: Array) -> torch.Tensor:
    """A CPU tensor on the memory of ``array``; copied only where torch cannot take it (negative strides, foreign byte order)."""
    for dtype, (carrier, special) in SPECIAL.items():
        if array.dtype == dtype.numpy:
            return to_tensor(array.view(str(carrier).removeprefix("torch."))).view(special)
    if not array.dtype.isnative or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    if array.flags.writeable or array.size == 0:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    return torch.from_numpy(np.asarray(_Memory(array)))


def to_array(tensor: torch.Tensor) -> Array:
    """A NumPy array on the memory of a CPU tensor, or on a copy of another device's."""
    tensor = tensor.detach().cpu()
    for dtype, (carrier, special) in SPECIAL.items():
        if tensor.dtype == special:
            return to_array(tensor.view(carrier)).view(dtype.numpy)
    found: Array = tensor.numpy()
    return found
