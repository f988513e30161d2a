"""The run-time form of a value with a ``QuantType``: the stored codes and their scales; and how weights change their dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from deltaloom.graph.types import QuantType, TensorType

Array = np.ndarray[Any, np.dtype[Any]]

SCALE_SUFFIX = "_scale_inv"  # block FP8: X.weight is multiplied by X.weight_scale_inv


@dataclass(frozen=True)
class QuantizedArray:
    """``data`` and ``scale`` are arrays of the shapes and dtypes that ``form`` gives for ``shape``, the shape of the value that is
    meant; within a backend they are its own tensors."""

    data: Any
    scale: Any
    form: QuantType
    shape: tuple[int, ...]

    @property
    def type(self) -> TensorType:
        """The type of the value."""
        return self.form[self.shape]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.data.nbytes + self.scale.nbytes)

    def __getitem__(self, index: int) -> QuantizedArray:
        """One of a stack of matrices, as a view."""
        return QuantizedArray(self.data[index], self.scale[index], self.form, self.shape[1:])

    def part(self, axis: int, start: int, stop: int) -> QuantizedArray:
        """``[start:stop]`` of an axis, as a view; both are borders of blocks, or the axis's end."""
        axis %= len(self.shape)
        size = stop - start
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        data = _from(self.data, axis, self._index(axis, start, scales=False), self.form.data_shape(shape)[axis])
        scale = _from(self.scale, axis, self._index(axis, start, scales=True), self.form.scale_shape(shape)[axis])
        return QuantizedArray(data, scale, self.form, shape)

    def split(self, sizes: Sequence[int], axis: int) -> tuple[QuantizedArray, ...]:
        """Consecutive parts of these sizes along an axis, as views."""
        return tuple(self.part(axis, stop - size, stop) for size, stop in zip(sizes, accumulate(sizes)))

    def reshape(self, shape: tuple[int, ...]) -> QuantizedArray:
        """The same rows in another stack of matrices."""
        form = self.form
        return QuantizedArray(self.data.reshape(form.data_shape(shape)), self.scale.reshape(form.scale_shape(shape)), form, shape)

    def _index(self, axis: int, position: int, *, scales: bool) -> int:
        """Where ``position`` of an axis begins in the scales or in the codes: as many entries as what lies before it takes."""
        if position == 0:
            return 0
        before = (*self.shape[:axis], position, *self.shape[axis + 1 :])
        return (self.form.scale_shape(before) if scales else self.form.data_shape(before))[axis]


def empty(type_: TensorType) -> QuantizedArray:
    """A quantised array of this type with any content."""
    form, shape = type_.dtype, type_.static_shape()
    assert isinstance(form, QuantType)
    return QuantizedArray(
        np.empty(form.data_shape(shape), form.stored.numpy), np.empty(form.scale_shape(shape), form.scale.numpy), form, shape
    )


def joined(parts: Sequence[QuantizedArray], axis: int, concatenate: Callable[..., Any]) -> QuantizedArray:
    """One after the other along an axis; each but the last ends at a border of blocks. ``concatenate(arrays, axis)`` joins."""
    first = parts[0]
    axis %= len(first.shape)
    shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    data = concatenate([part.data for part in parts], axis)
    return QuantizedArray(data, concatenate([part.scale for part in parts], axis), first.form, shape)


def stacked(parts: Sequence[QuantizedArray], stack: Callable[..., Any]) -> QuantizedArray:
    """Along a new first axis. ``stack(arrays)`` does that to arrays."""
    first = parts[0]
    data, scale = stack([part.data for part in parts]), stack([part.scale for part in parts])
    return QuantizedArray(data, scale, first.form, (len(parts), *first.shape))


def copy_cast(source: Array, out: Array) -> None:
    """Copy with a change of dtype. bfloat16 widens to float32 by placing its 16 bits high, several times faster than a cast."""
    if source.dtype.name == "bfloat16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, source.view(np.uint16), casting="unsafe")
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, source, casting="unsafe")


def _from(array: Array, axis: int, start: int, count: int) -> Array:
    part: Array = array[(slice(None),) * axis + (slice(start, start + count),)]
    return part
