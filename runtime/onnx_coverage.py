"""Which ops can be exported to ONNX in which profile: what the exporter makes of a case of each op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends.onnx.functions import Library
from deltaloom.backends.onnx.profiles import ALL
from deltaloom.graph.errors import DeltaloomError
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.registry import ops
from deltaloom.graph.types import DTYPES, TensorType, f32

RULE, PARTS, NONE = "rule", "parts", "no"
"""Exported by the op's own rule; as what it is made of; not at all."""


@dataclass(frozen=True)
class OnnxCoverage:
    """An op; profile -> its status there; and why it cannot be exported, if it cannot."""

    op: str
    status: Mapping[str, str]
    reason: str


def onnx_coverage() -> tuple[OnnxCoverage, ...]:
    """All ops of the registry, those of plugins too."""
    return tuple(_coverage(op) for op in ops)


def _coverage(op: type[Op]) -> OnnxCoverage:
    """Op and types come from the op's ``cases``, floats as float32; an op without cases counts by its rules alone."""
    if op.onnx is None and op.decompose is None:
        return OnnxCoverage(op.name, dict.fromkeys(map(str, ALL), NONE), "it has neither an onnx rule nor a decomposition")
    own = RULE if op.onnx is not None else PARTS
    if op.cases is None:
        return OnnxCoverage(op.name, dict.fromkeys(map(str, ALL), own), "")
    case = op.cases(_Numbers())
    types = tuple(map(_type, case.arrays))
    status, reasons = {}, []
    for profile in ALL:
        try:
            Library(profile).function(case.op, types)
            status[str(profile)] = own
        except DeltaloomError as error:
            status[str(profile)] = NONE
            reasons.append(str(error))
    return OnnxCoverage(op.name, status, reasons[0] if reasons else "")


def _type(array: Array | QuantizedArray) -> TensorType:
    """The type of an input as models have it: a weight that is stored quantised comes as the numbers that it means."""
    if isinstance(array, QuantizedArray):
        return f32[array.shape]
    dtype = next(dtype for dtype in DTYPES.values() if dtype.numpy == array.dtype)
    return TensorType(f32 if dtype.kind == "float" else dtype, tuple(array.shape))


class _Numbers:
    """What ``cases`` draws from: always the same plain case."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def integer(self, low: int, high: int) -> int:
        return min(high, max(low, 2))

    def size(self, high: int = 9) -> int:
        return min(high, 4)

    def choice(self, *options: Any) -> Any:
        return options[0]

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        numbers: Array = self._rng.standard_normal(shape) * scale
        return numbers

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        return self._rng.uniform(low, high, shape)

    def integers(self, low: int, high: int, *shape: int) -> Array:
        return self._rng.integers(low, high + 1, shape)
