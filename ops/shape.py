"""Ops that move elements and change none."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.types import TensorType
from deltaloom.ops.laws import PermutationEquivariant


class Reshape(Op):
    """x with another ``shape`` of as many elements, row-major; every size is a number."""

    name: ClassVar[str] = "reshape"
    shape: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        fits = prod(x.static_shape()) == prod(self.shape)
        require(fits, f"x {x} cannot be reshaped to {list(self.shape)}: other element counts")
        require(all(size > 0 for size in self.shape), f"reshape to {list(self.shape)}: every size must be at least 1")
        return TensorType(x.plain_dtype, self.shape)

    def reference(self, x: Array) -> Array:
        return x.reshape(self.shape)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.reshape(self.shape)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        a, b, c = draw.size(), draw.size(), draw.size()
        return Case(cls(draw.choice((a * b, c), (b, a, c), (a, c * b), (a * b * c,))), (draw.normal(a, b, c),))


class Unflatten(Op):
    """x with its last axis cut into ``sizes``, row-major."""

    name: ClassVar[str] = "unflatten"
    sizes: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        fits = x.rank > 0 and x.shape[-1] == prod(self.sizes)
        require(fits, f"the last axis of x {x} is not {' x '.join(map(str, self.sizes))}")
        require(all(size > 0 for size in self.sizes), f"unflatten into {self.sizes}: every size must be at least 1")
        return TensorType(x.plain_dtype, (*x.shape[:-1], *self.sizes))

    def reference(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], *self.sizes)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.unflatten(-1, self.sizes)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        sizes = tuple(draw.size(5) for _ in range(draw.integer(1, 3)))
        return Case(cls(sizes), (draw.normal(draw.size(), draw.size(), prod(sizes)),))


class Flatten(Op):
    """x with its last ``axes`` axes merged into one, row-major."""

    name: ClassVar[str] = "flatten"
    axes: int = 2

    def infer(self, x: TensorType) -> TensorType:
        require(1 <= self.axes <= x.rank, f"flatten merges the last {self.axes} axes, but x is {x}")
        kept, merged = x.shape[: x.rank - self.axes], x.shape[x.rank - self.axes :]
        known = all(isinstance(dim, int) for dim in merged)
        require(known, f"flatten needs known sizes in the last {self.axes} axes of x {x}")
        size: Dim = 1
        for dim in merged:
            size = size * dim
        return TensorType(x.plain_dtype, (*kept, size))

    def reference(self, x: Array) -> Array:
        kept = x.ndim - self.axes
        return x.reshape(*x.shape[:kept], prod(x.shape[kept:]))

    def torch(self, torch: Any, x: Any) -> Any:
        return x.flatten(-self.axes)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = tuple(draw.size(5) for _ in range(draw.integer(1, 4)))
        return Case(cls(draw.integer(1, len(shape))), (draw.normal(*shape),))


class Concat(Op):
    """The inputs one after the other along ``axis``."""

    name: ClassVar[str] = "concat"
    axis: int

    def infer(self, *xs: TensorType) -> TensorType:
        first = xs[0]
        axis = _axis(self.axis, "x", first)
        total: Dim = 0
        for position, x in enumerate(xs):
            fits = x.rank == first.rank and _without(x, axis) == _without(first, axis) and x.dtype == first.dtype
            require(fits, f"input {position} of concat is {x}, but input 0 {first}: only axis {axis} may differ")
            total = total + x.shape[axis]
        return TensorType(first.plain_dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))

    def reference(self, *xs: Array) -> Array:
        return np.concatenate(xs, axis=self.axis)

    def torch(self, torch: Any, *xs: Any) -> Any:
        return torch.cat(xs, dim=self.axis)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = [draw.size(5) for _ in range(draw.integer(1, 3))]
        axis = draw.integer(-len(shape), len(shape) - 1)
        arrays = []
        for _ in range(draw.integer(1, 4)):
            shape[axis] = draw.size()
            arrays.append(draw.normal(*shape))
        return Case(cls(axis), tuple(arrays))


class Split(Op):
    """x cut along ``axis`` into consecutive parts of ``sizes``, which add up to that axis."""

    name: ClassVar[str] = "split"
    sizes: tuple[int, ...]
    axis: int = -1

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        axis = _axis(self.axis, "x", x)
        require(x.shape[axis] == sum(self.sizes), f"axis {axis} of x {x} is not {' + '.join(map(str, self.sizes))}")
        require(all(size > 0 for size in self.sizes), f"split into {list(self.sizes)}: every size must be at least 1")
        dtype = x.plain_dtype
        return tuple(TensorType(dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in self.sizes)

    def reference(self, x: Array) -> tuple[Array, ...]:
        return tuple(np.split(x, np.cumsum(self.sizes)[:-1], axis=self.axis))

    def torch(self, torch: Any, x: Any) -> Any:
        return torch.split(x, self.sizes, dim=self.axis)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = [draw.size(5) for _ in range(draw.integer(1, 3))]
        axis = draw.integer(-len(shape), len(shape) - 1)
        sizes = tuple(draw.size() for _ in range(draw.integer(1, 4)))
        shape[axis] = sum(sizes)
        return Case(cls(sizes, axis), (draw.normal(*shape),))


class Stack(Op):
    """The inputs, of one type, along a new first axis."""

    name: ClassVar[str] = "stack"

    def infer(self, *xs: TensorType) -> TensorType:
        for position, x in enumerate(xs):
            require(x == xs[0], f"input {position} of stack is {x}, but input 0 is {xs[0]}")
        return TensorType(xs[0].plain_dtype, (len(xs), *xs[0].shape))

    def reference(self, *xs: Array) -> Array:
        return np.stack(xs)

    def torch(self, torch: Any, *xs: Any) -> Any:
        return torch.stack(xs)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = tuple(draw.size(5) for _ in range(draw.integer(1, 3)))
        return Case(cls(), tuple(draw.normal(*shape) for _ in range(draw.integer(1, 4))))


class Transpose(Op):
    """x with its axes in the order ``axes``: axis i of the result is axis ``axes[i]`` of x."""

    name: ClassVar[str] = "transpose"
    axes: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        fits = sorted(self.axes) == list(range(x.rank))
        require(fits, f"axes {list(self.axes)} are not an order of the {x.rank} axes of x {x}")
        return TensorType(x.plain_dtype, tuple(x.shape[axis] for axis in self.axes))

    def reference(self, x: Array) -> Array:
        return x.transpose(self.axes)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.permute(self.axes)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = tuple(draw.size(5) for _ in range(draw.integer(1, 4)))
        order = np.argsort(draw.uniform(0, 1, len(shape)))
        return Case(cls(tuple(int(axis) for axis in order)), (draw.normal(*shape),))


class TakeLast(Op):
    """The last position of x [batch, seq, ...], as [batch, 1, ...]."""

    name: ClassVar[str] = "take_last"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("x",)),)

    def infer(self, x: TensorType) -> TensorType:
        require(x.rank >= 2, f"x {x} should be [batch, seq, ...]")
        return TensorType(x.plain_dtype, (x.shape[0], 1, *x.shape[2:]))

    def reference(self, x: Array) -> Array:
        return x[:, -1:]

    def torch(self, torch: Any, x: Any) -> Any:
        return x[:, -1:]

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        rest = [draw.size(5) for _ in range(draw.integer(0, 2))]
        return Case(cls(), (draw.normal(draw.integer(1, 3), draw.size(), *rest),))


def _axis(axis: int, name: str, type_: TensorType) -> int:
    """``axis`` counted from the front."""
    require(-type_.rank <= axis < type_.rank, f"{name} {type_} has no axis {axis}")
    return axis % type_.rank


def _without(type_: TensorType, axis: int) -> tuple[Dim, ...]:
    return (*type_.shape[:axis], *type_.shape[axis + 1 :])
