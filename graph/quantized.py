"""The run-time form of a value with a ``QuantType``: the stored matrix and its block scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class QuantizedArray:
    """``data [rows, columns]`` in the storage dtype, ``scale [ceil(rows/block[0]), ceil(columns/block[1])]``; scales multiply."""

    data: Array
    scale: Array
    block: tuple[int, int]
