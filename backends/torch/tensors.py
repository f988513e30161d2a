"""NumPy arrays and torch tensors of the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deltaloom.graph.op import Array
from deltaloom.graph.types import DType

BITS: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
}
"""Dtypes that torch and NumPy cannot exchange directly: the NumPy type that carries their bits, and the torch dtype."""


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
    carrier = BITS.get(array.dtype.name)
    if carrier is not None:
        return to_tensor(array.view(carrier[0])).view(carrier[1])
    if not array.dtype.isnative or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
    if array.size == 0 or array.flags.writeable:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    return torch.from_numpy(np.asarray(_Memory(array)))


def to_array(tensor: torch.Tensor) -> Array:
    """A NumPy array on the memory of a CPU tensor, or on a copy of another device's."""
    tensor = tensor.detach().cpu()
    for name, (bits, dtype) in BITS.items():
        if tensor.dtype == dtype:
            carrier = torch.int16 if bits is np.int16 else torch.uint8
            target = DTYPE_BY_NAME[name]
            array: Array = tensor.view(carrier).numpy().view(target)
            return array
    found: Array = tensor.numpy()
    return found
