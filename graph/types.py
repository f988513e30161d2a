"""What a value is: dtype and shape, printed as ``f32[batch, seq, 2048]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import ml_dtypes
import numpy as np

from deltaloom.graph.dims import Dim, Symbol, parse_dim, substitute, symbols_of
from deltaloom.graph.errors import GraphError

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class DType:
    """An element type. ``numpy`` is its NumPy dtype (through ml_dtypes for bfloat16 and float8)."""

    name: str
    long_name: str
    kind: Literal["float", "int", "bool"]

    @cached_property
    def numpy(self) -> np.dtype[np.generic]:
        special = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
        dtype: np.dtype[np.generic] = np.dtype(special.get(self.long_name, self.long_name))
        return dtype

    @property
    def itemsize(self) -> int:
        return self.numpy.itemsize

    def __getitem__(self, shape: Dim | Shape) -> TensorType:
        return TensorType(self, shape if isinstance(shape, tuple) else (shape,))

    def __str__(self) -> str:
        return self.name


f64 = DType("f64", "float64", "float")
f32 = DType("f32", "float32", "float")
f16 = DType("f16", "float16", "float")
bf16 = DType("bf16", "bfloat16", "float")
f8_e4m3 = DType("f8_e4m3", "float8_e4m3fn", "float")
i64 = DType("i64", "int64", "int")
i32 = DType("i32", "int32", "int")
i8 = DType("i8", "int8", "int")
u8 = DType("u8", "uint8", "int")
bool_ = DType("bool", "bool", "bool")

DTYPES: dict[str, DType] = {d.name: d for d in (f64, f32, f16, bf16, f8_e4m3, i64, i32, i8, u8, bool_)}
LONG_NAMES: dict[str, DType] = {d.long_name: d for d in DTYPES.values()}


@dataclass(frozen=True)
class QuantType:
    """A matrix stored in ``storage`` with one ``scale`` a block of ``block`` rows and columns; it multiplies."""

    storage: DType
    block: tuple[int, int]
    scale: DType

    kind = "float"

    def __getitem__(self, shape: Shape) -> TensorType:
        return TensorType(self, shape)

    def scale_shape(self, shape: Shape) -> tuple[int, int]:
        """Shape of the scales of a matrix ``[rows, columns]``: one a block begun."""
        rows, columns = shape
        if not isinstance(rows, int) or not isinstance(columns, int):
            raise GraphError(f"a quantised matrix needs known sizes, got {shape}")
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    def __str__(self) -> str:
        return f"{self.storage}{{block {self.block[0]}x{self.block[1]}, scale {self.scale}}}"


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a value."""

    dtype: DType | QuantType
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def plain_dtype(self) -> DType:
        """The dtype, or ``GraphError`` for a quantised type."""
        if isinstance(self.dtype, QuantType):
            raise GraphError(f"{self} is quantised where a plain tensor is expected; dequantise it first")
        return self.dtype

    def with_shape(self, *shape: Dim) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType | QuantType) -> TensorType:
        return TensorType(dtype, self.shape)

    def substitute(self, values: Mapping[str, Dim]) -> TensorType:
        return TensorType(self.dtype, tuple(substitute(dim, values) for dim in self.shape))

    def symbols(self) -> frozenset[Symbol]:
        return frozenset(s for dim in self.shape for s in symbols_of(dim))

    def static_shape(self) -> tuple[int, ...]:
        """The shape as numbers, or ``GraphError`` where a dimension is symbolic."""
        sizes = tuple(dim for dim in self.shape if isinstance(dim, int))
        if len(sizes) != len(self.shape):
            raise GraphError(f"{self} has a symbolic dimension where numbers are needed")
        return sizes

    def elements(self) -> Dim:
        total: Dim = 1
        for dim in self.shape:
            total = total * dim
        return total

    def nbytes(self) -> Dim:
        """Bytes of the tensor; a quantised one counts its scales."""
        if isinstance(self.dtype, QuantType):
            rows, columns = self.dtype.scale_shape(self.shape)
            return self.elements() * self.dtype.storage.itemsize + rows * columns * self.dtype.scale.itemsize
        return self.elements() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


_TYPE = re.compile(r"(?P<dtype>\w+)(\{block (?P<rows>\d+)x(?P<columns>\d+), scale (?P<scale>\w+)\})?\[(?P<shape>[^\]]*)\]")


def parse_type(text: str, known: Mapping[str, Symbol]) -> TensorType:
    """Read what ``str(type)`` printed."""
    found = _TYPE.fullmatch(text.strip())
    if not found:
        raise GraphError(f"'{text}' is not a type; expected for example f32[batch, seq, 2048]")
    dtype: DType | QuantType = dtype_named(found["dtype"])
    if found["rows"]:
        assert isinstance(dtype, DType)
        dtype = QuantType(dtype, (int(found["rows"]), int(found["columns"])), dtype_named(found["scale"]))
    parts = [part for part in found["shape"].split(",") if part.strip()]
    return TensorType(dtype, tuple(parse_dim(part.strip(), known) for part in parts))


def dtype_named(name: str) -> DType:
    """The dtype of a short (``bf16``) or long (``bfloat16``) name."""
    dtype = DTYPES.get(name) or LONG_NAMES.get(name)
    if dtype is None:
        raise GraphError(f"unknown dtype '{name}'; known are {', '.join(LONG_NAMES)}")
    return dtype
