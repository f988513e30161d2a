"""Ops that move data: views where a view will do."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Protocol, cast

import numpy as np

from deltaloom.backends.numpy.table import table
from deltaloom.graph.op import Array, Op


class _Split(Protocol):
    sizes: tuple[int, ...]
    axis: int


class _Concat(Protocol):
    axis: int


class _Flatten(Protocol):
    axes: int


@table.kernel("unflatten")
def unflatten(op: Op, x: Array) -> Array:
    """A view where strides allow it; 1 us less than through the reference."""
    return x.reshape(*x.shape[:-1], *cast(_Split, op).sizes)


@table.kernel("flatten")
def flatten(op: Op, x: Array) -> Array:
    """As ``unflatten``."""
    kept = x.ndim - cast(_Flatten, op).axes
    return x.reshape(*x.shape[:kept], prod(x.shape[kept:]))


@table.kernel("split")
def split(op: Op, x: Array) -> tuple[Array, ...]:
    """Slices are views; ``np.split`` takes 3 us more."""
    return tuple([x[part] for part in _parts(cast(_Split, op).sizes, cast(_Split, op).axis, x.ndim)])


@cache
def _parts(sizes: tuple[int, ...], axis: int, rank: int) -> list[tuple[slice, ...]]:
    """The index of each part."""
    before = (slice(None),) * (axis % rank)
    return [(*before, slice(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]


@table.kernel("concat", into=True)
def concat(op: Op, *arrays: Array, out: Array | None = None) -> Array:
    """As the reference, which cannot be given a buffer."""
    return np.concatenate(arrays, axis=cast(_Concat, op).axis, out=out)


@table.kernel("embedding", into=True)
def embedding(op: Op, ids: Array, weight: Array, *, out: Array | None = None) -> Array:
    """``take`` copies rows without the machinery of fancy indexing; only where it need not refuse an id does it write to ``out``
    without a copy between."""
    inside = out is not None and ids.min() >= 0 and ids.max() < len(weight)
    return weight.take(ids, axis=0, out=out, mode="clip" if inside else "raise")


@table.kernel("mask_padding")
def mask_padding(op: Op, x: Array, valid: Array) -> Array:
    """Without padding, the input itself."""
    own = valid[:, valid.shape[1] - x.shape[1] :]
    if own.all():
        return x
    return np.where(own.reshape(*own.shape, *(1,) * (x.ndim - 2)), x, np.zeros((), x.dtype))
