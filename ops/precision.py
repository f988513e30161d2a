"""Where precision changes: the wide dtype is float32, or float64 in a float64 model.

Qwen3-Next specification, section 15.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deltaloom.graph.op import Array
from deltaloom.graph.types import DType, f32, f64


def wide_dtype(dtype: DType) -> DType:
    """float64 for float64, float32 for every other dtype."""
    return f64 if dtype == f64 else f32


def wide(array: Array) -> Array:
    """``array`` in its wide dtype."""
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def wide_tensor(torch: Any, tensor: Any) -> Any:
    """``tensor`` in its wide dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def sigmoid(array: Array) -> Array:
    """1 / (1 + exp(-x)), computed wide and rounded once."""
    rounded: Array = (1 / (1 + np.exp(-wide(array)))).astype(array.dtype)
    return rounded


def silu(array: Array) -> Array:
    """x / (1 + exp(-x)), computed wide and rounded once."""
    rounded: Array = (wide(array) / (1 + np.exp(-wide(array)))).astype(array.dtype)
    return rounded
