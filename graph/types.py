"""What a value is: dtype and shape, printed as ``f32[batch, seq, 2048]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import ml_dtypes
import numpy as np

from deltaloom.graph.dims import Dim, Symbol, parse_dim, substitute, symbols_of
from deltaloom.graph.errors import GraphError, require

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


i4 = DType("i4", "int4", "int")
"""Codes of four bits; only a ``QuantType`` stores them, two a byte, so it is no dtype of plain values."""

CODES: dict[str, DType] = {"fp8_e4m3": f8_e4m3, "int8": i8, "int4": i4}
"""What quantised matrices may be stored in, by the name that their types print."""


@dataclass(frozen=True)
class QuantType:
    """Matrices ``[..., rows, columns]`` of codes in ``storage`` with one ``scale``, which multiplies, for each ``block``
    (rows, columns) of the last two axes. The last block of an axis is shorter where its size does not divide the axis.
    Columns None: the block is as wide as the matrix.

    It prints ``fp8_e4m3{block 128x128, scale f32}``, ``int8{row, scale f32}``, ``int4{group 32, scale bf16}``; a row is a block of
    one row and all columns, a group one of one row and so many columns. ``GraphError`` for codes, blocks or scales of no such form.
    """

    storage: DType
    block: tuple[int, int | None]
    scale: DType

    kind = "float"

    def __post_init__(self) -> None:
        rows, columns = self.block
        require(self.storage in CODES.values(), f"{self.storage} is no dtype of quantised codes; they are {', '.join(CODES)}")
        require(rows >= 1 and (columns is None or columns >= 1), f"a block of {rows} x {columns} has no elements")
        require(columns is not None or rows == 1, f"a block of {rows} whole rows; only one row can be whole")
        even = self.storage != i4 or columns is None or columns % 2 == 0
        require(even, f"blocks of int4 have {columns} columns; expected an even number, because two codes share a byte")
        require(self.scale in (f32, f16, bf16, f64), f"scales are {self.scale}, expected f32, bf16, f16 or f64")

    def __getitem__(self, shape: Shape) -> TensorType:
        return TensorType(self, shape)

    @property
    def stored(self) -> DType:
        """The dtype of the array that holds the codes: two int4 are one u8, the even column in the low half."""
        return u8 if self.storage == i4 else self.storage

    def data_shape(self, shape: Shape) -> tuple[int, ...]:
        """Shape of the array of codes of ``[..., rows, columns]``."""
        *lead, rows, columns = self._sizes(shape)
        return (*lead, rows, -(-columns // 2) if self.storage == i4 else columns)

    def scale_shape(self, shape: Shape) -> tuple[int, ...]:
        """Shape of the scales of ``[..., rows, columns]``: one a block begun."""
        *lead, rows, columns = self._sizes(shape)
        width = columns if self.block[1] is None else self.block[1]
        return (*lead, -(-rows // self.block[0]), -(-columns // width))

    def cuts(self, axis: int, position: int) -> bool:
        """Whether ``position`` of an axis, counted from the end (-1 columns, -2 rows), is a border of blocks."""
        if axis == -1:
            return position == 0 or self.block[1] is not None and position % self.block[1] == 0
        return axis != -2 or position % self.block[0] == 0

    def _sizes(self, shape: Shape) -> tuple[int, ...]:
        sizes = tuple(dim for dim in shape if isinstance(dim, int))
        require(len(sizes) == len(shape), f"a quantised matrix needs known sizes, got [{', '.join(map(str, shape))}]")
        require(len(sizes) >= 2, f"a quantised value is a matrix or a stack of them, got [{', '.join(map(str, shape))}]")
        return sizes

    def __str__(self) -> str:
        name = next(name for name, dtype in CODES.items() if dtype == self.storage)
        rows, columns = self.block
        form = "row" if columns is None else f"group {columns}" if rows == 1 else f"block {rows}x{columns}"
        return f"{name}{{{form}, scale {self.scale}}}"


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
        return frozenset(self.ordered_symbols)

    @cached_property
    def ordered_symbols(self) -> tuple[Symbol, ...]:
        """The symbols of the shape, by name."""
        return tuple(sorted({s for dim in self.shape if not isinstance(dim, int) for s in symbols_of(dim)}))

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
            codes, scales = prod(self.dtype.data_shape(self.shape)), prod(self.dtype.scale_shape(self.shape))
            return codes * self.dtype.stored.itemsize + scales * self.dtype.scale.itemsize
        return self.elements() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(dim) for dim in self.shape)}]"


_TYPE = re.compile(
    r"(?P<dtype>\w+)(\{(?P<block>row|group (?P<group>\d+)|block (?P<rows>\d+)x(?P<columns>\d+)), scale (?P<scale>\w+)\})?"
    r"\[(?P<shape>[^\]]*)\]"
)


def parse_type(text: str, known: Mapping[str, Symbol]) -> TensorType:
    """Read what ``str(type)`` printed."""
    found = _TYPE.fullmatch(text.strip())
    if not found:
        raise GraphError(f"'{text}' is not a type; expected for example f32[batch, seq, 2048]")
    parts = [part for part in found["shape"].split(",") if part.strip()]
    dtype = _quantised(found) if found["block"] else dtype_named(found["dtype"])
    return TensorType(dtype, tuple(parse_dim(part.strip(), known) for part in parts))


def parse_quant(text: str) -> QuantType:
    """Read what ``str(quantised dtype)`` printed, such as ``int4{group 32, scale bf16}``."""
    dtype = parse_type(f"{text}[]", {}).dtype
    if not isinstance(dtype, QuantType):
        raise GraphError(f"'{text}' is not a quantised dtype; expected for example int8{{row, scale f32}}")
    return dtype


def _quantised(found: re.Match[str]) -> QuantType:
    storage = CODES.get(found["dtype"])
    if storage is None:
        raise GraphError(f"'{found['dtype']}' is no form of quantised codes; known are {', '.join(CODES)}")
    block = (int(found["rows"]), int(found["columns"])) if found["rows"] else (1, int(found["group"]) if found["group"] else None)
    return QuantType(storage, block, dtype_named(found["scale"]))


def dtype_named(name: str) -> DType:
    """The dtype of a short (``bf16``) or long (``bfloat16``) name."""
    dtype = DTYPES.get(name) or LONG_NAMES.get(name)
    if dtype is None:
        raise GraphError(f"unknown dtype '{name}'; known are {', '.join(LONG_NAMES)}")
    return dtype
