"""Checks that ``infer`` rules are built from: axes by name and dtypes, with sentences that show the offending type."""

from __future__ import annotations

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError, require
from deltaloom.graph.types import DType, TensorType, f8_e4m3


class Axes:
    """The axes of one op's inputs by name: an axis has one size wherever its name occurs."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[tuple[Dim, ...], str]] = {}

    def bind(self, name: str, type_: TensorType, axes: str) -> None:
        """Check the input ``name`` against ``axes``, such as ``"batch seq 3 heads"``: a number is an axis of that size,
        ``...`` (once) any number of axes. Raises ``GraphError``."""
        words = axes.split()
        free = type_.rank - (len(words) - 1)
        wanted = f"{name} {type_} should be [{', '.join(words)}]"
        if "..." in words:
            require(free >= 0, f"{wanted}: it has {type_.rank} axes")
        else:
            require(type_.rank == len(words), f"{wanted}: it has {type_.rank} axes, not {len(words)}")
        position = 0
        for word in words:
            length = free if word == "..." else 1
            sizes = type_.shape[position : position + length]
            position += length
            if word.isdigit():
                require(sizes == (int(word),), f"{wanted}: an axis is {sizes[0]}, not {word}")
                continue
            known, source = self._found.setdefault(word, (sizes, name))
            require(known == sizes, f"{wanted}: '{word}' is {_show(sizes)}, but {_show(known)} in {source}")

    def __getitem__(self, axis: str) -> Dim:
        return self._found[axis][0][0]

    def number(self, axis: str) -> int:
        """The size of an axis that must be known; ``GraphError`` for a symbolic one."""
        size, source = self[axis], self._found[axis][1]
        if not isinstance(size, int):
            raise GraphError(f"axis '{axis}' of {source} is {size}, but must be a known number")
        return size


def floating(name: str, type_: TensorType) -> DType:
    """The dtype of an input that must be a plain float of at least 16 bits."""
    dtype = type_.plain_dtype
    require(dtype.kind == "float" and dtype != f8_e4m3, f"{name} is {type_}, expected f64, f32, f16 or bf16")
    return dtype


def integral(name: str, type_: TensorType) -> DType:
    """The dtype of an input that must be i32 or i64."""
    dtype = type_.plain_dtype
    require(dtype.name in ("i32", "i64"), f"{name} is {type_}, expected i32 or i64")
    return dtype


def has_dtype(name: str, type_: TensorType, dtype: DType, why: str) -> None:
    """``GraphError`` unless the input has ``dtype``; ``why`` completes the sentence: "as x", "for the mask"."""
    require(type_.dtype == dtype, f"{name} is {type_}, expected {dtype} {why}")


def _show(sizes: tuple[Dim, ...]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"[{', '.join(map(str, sizes))}]"
