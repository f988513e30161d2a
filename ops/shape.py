"""Ops that move elements and change none."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError, require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.quantized import QuantizedArray, joined, stacked
from deltaloom.graph.types import TensorType
from deltaloom.ops.laws import PermutationEquivariant
from deltaloom.ops.quantized import Quantize, draw_form, draw_pieces, require_borders, require_rows


def _only_a_view(op: Op, *types: TensorType) -> Cost:
    """The input seen in another way: nothing is computed and nothing moves."""
    return Cost(0, 0)


class Reshape(Op):
    """x with another ``shape`` of as many elements, row-major; every size is a number. A quantised x keeps its rows."""

    name: ClassVar[str] = "reshape"
    shape: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        fits = prod(x.static_shape()) == prod(self.shape)
        require(fits, f"x {x} cannot be reshaped to {list(self.shape)}: other element counts")
        require(all(size > 0 for size in self.shape), f"reshape to {list(self.shape)}: every size must be at least 1")
        require_rows("x", x, self.shape)
        return TensorType(x.dtype, self.shape)

    def factors(self, x: TensorType) -> str:
        return _regrouped(x.static_shape(), self.shape)

    def resized(self, out: TensorType) -> Reshape:
        return Reshape(out.static_shape())

    def reference(self, x: Array | QuantizedArray) -> Array | QuantizedArray:
        return x.reshape(self.shape)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.reshape(self.shape)

    def onnx(self, b: Any, x: str) -> Any:
        return b.reshape(x, *self.shape)

    cost = _only_a_view

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        a, b, c = draw.size(), draw.size(), draw.size()
        if draw.choice(False, False, True):
            form = draw_form(draw)
            rows = form.block[0]
            x = Quantize(str(form)).reference(draw.normal(a, b * rows, c))
            return Case(cls(draw.choice((a * b * rows, c), (a * b, rows, c))), (x,))
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

    def factors(self, x: TensorType) -> str:
        names = _names(len(self.sizes))
        return f"+... ({names}) -> ... {names}"

    def resized(self, out: TensorType) -> Unflatten:
        return Unflatten(out.with_shape(*out.shape[out.rank - len(self.sizes) :]).static_shape())

    def reference(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], *self.sizes)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.unflatten(-1, self.sizes)

    def onnx(self, b: Any, x: str) -> Any:
        return b.reshape(x, *(b.size(x, axis) for axis in range(b.type(x).rank - 1)), *self.sizes)

    cost = _only_a_view

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

    def factors(self, x: TensorType) -> str:
        names = _names(self.axes)
        return f"+... {names} -> ... ({names})"

    def reference(self, x: Array) -> Array:
        kept = x.ndim - self.axes
        return x.reshape(*x.shape[:kept], prod(x.shape[kept:]))

    def torch(self, torch: Any, x: Any) -> Any:
        return x.flatten(-self.axes)

    def onnx(self, b: Any, x: str) -> Any:
        kept = b.type(x).rank - self.axes
        return b.reshape(x, *(b.size(x, axis) for axis in range(kept)), prod(b.type(x).shape[kept:]))

    cost = _only_a_view

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = tuple(draw.size(5) for _ in range(draw.integer(1, 4)))
        return Case(cls(draw.integer(1, len(shape))), (draw.normal(*shape),))


class Concat(Op):
    """The inputs one after the other along ``axis``; quantised ones join at borders of their blocks."""

    name: ClassVar[str] = "concat"
    axis: int

    def infer(self, *xs: TensorType) -> TensorType:
        first = xs[0]
        axis = _axis(self.axis, "x", first)
        rest = _without(first, axis)
        total: Dim = 0
        for position, x in enumerate(xs):
            same = x is first or (x.rank == first.rank and _without(x, axis) == rest and x.dtype == first.dtype)
            if not same:  # hundreds of experts come by here, so the message is written only where it is needed
                raise GraphError(f"input {position} of concat is {x}, but input 0 {first}: only axis {axis} may differ")
            total = total + x.shape[axis]
        whole = TensorType(first.dtype, (*first.shape[:axis], total, *first.shape[axis + 1 :]))
        require_borders("the result", whole, axis, [x.shape[axis] for x in xs])
        return whole

    def factors(self, *xs: TensorType) -> str:
        axis = _axis(self.axis, "x", xs[0])
        parts, rest = _names(len(xs)).split(), [f"a{i}" for i in range(xs[0].rank)]
        inputs = (" ".join((*rest[:axis], part, *rest[axis + 1 :])) for part in parts)
        return f"+{', +'.join(inputs)} -> {' '.join((*rest[:axis], _pieces(parts), *rest[axis + 1 :]))}"

    def reference(self, *xs: Any) -> Array | QuantizedArray:
        return joined(xs, self.axis, np.concatenate) if isinstance(xs[0], QuantizedArray) else np.concatenate(xs, axis=self.axis)

    def torch(self, torch: Any, *xs: Any) -> Any:
        return joined(xs, self.axis, torch.cat) if isinstance(xs[0], QuantizedArray) else torch.cat(xs, dim=self.axis)

    def onnx(self, b: Any, *xs: str) -> Any:
        return b.Concat(*xs, axis=self.axis)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = [draw.size(5) for _ in range(draw.integer(1, 3))]
        axis = draw.integer(-len(shape), len(shape) - 1)
        if draw.choice(False, False, True):
            axis, _, pieces = draw_pieces(draw)
            return Case(cls(axis), pieces)
        arrays = []
        for _ in range(draw.integer(1, 4)):
            shape[axis] = draw.size()
            arrays.append(draw.normal(*shape))
        return Case(cls(axis), tuple(arrays))


class Split(Op):
    """x cut along ``axis`` into consecutive parts of ``sizes``, which add up to that axis; a quantised x at borders of blocks."""

    name: ClassVar[str] = "split"
    sizes: tuple[int, ...]
    axis: int = -1

    def infer(self, x: TensorType) -> tuple[TensorType, ...]:
        axis = _axis(self.axis, "x", x)
        require(x.shape[axis] == sum(self.sizes), f"axis {axis} of x {x} is not {' + '.join(map(str, self.sizes))}")
        require(all(size > 0 for size in self.sizes), f"split into {list(self.sizes)}: every size must be at least 1")
        require_borders("x", x, axis, self.sizes)
        return tuple(TensorType(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in self.sizes)

    def factors(self, x: TensorType) -> str:
        axis = _axis(self.axis, "x", x)
        parts, rest = _names(len(self.sizes)).split(), [f"a{i}" for i in range(x.rank)]
        outputs = (" ".join((*rest[:axis], part, *rest[axis + 1 :])) for part in parts)
        return f"+{' '.join((*rest[:axis], _pieces(parts), *rest[axis + 1 :]))} -> {', '.join(outputs)}"

    def resized(self, *outs: TensorType) -> Split:
        sizes = tuple(out.with_shape(out.shape[self.axis]).static_shape()[0] for out in outs)
        return Split(sizes, self.axis)

    def reference(self, x: Array | QuantizedArray) -> tuple[Array | QuantizedArray, ...]:
        if isinstance(x, QuantizedArray):
            return x.split(self.sizes, self.axis)
        return tuple(np.split(x, np.cumsum(self.sizes)[:-1], axis=self.axis))

    def torch(self, torch: Any, x: Any) -> Any:
        return x.split(self.sizes, self.axis) if isinstance(x, QuantizedArray) else torch.split(x, self.sizes, dim=self.axis)

    def onnx(self, b: Any, x: str) -> Any:
        made = b.Split(x, b.ints(*self.sizes), axis=self.axis, outputs=len(self.sizes))
        return made if len(self.sizes) > 1 else (made,)

    cost = _only_a_view

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = [draw.size(5) for _ in range(draw.integer(1, 3))]
        axis = draw.integer(-len(shape), len(shape) - 1)
        if draw.choice(False, False, True):
            axis, whole, pieces = draw_pieces(draw)
            return Case(cls(tuple(piece.shape[axis] for piece in pieces), axis), (whole,))
        sizes = tuple(draw.size() for _ in range(draw.integer(1, 4)))
        shape[axis] = sum(sizes)
        return Case(cls(sizes, axis), (draw.normal(*shape),))


class Stack(Op):
    """The inputs, of one type, along a new first axis; quantised matrices become a quantised stack of them."""

    name: ClassVar[str] = "stack"

    def infer(self, *xs: TensorType) -> TensorType:
        for position, x in enumerate(xs):
            if x is not xs[0] and x != xs[0]:
                raise GraphError(f"input {position} of stack is {x}, but input 0 is {xs[0]}")
        return TensorType(xs[0].dtype, (len(xs), *xs[0].shape))

    def factors(self, *xs: TensorType) -> str:
        axes = _names(xs[0].rank)
        return f"{', '.join(['+' + axes] * len(xs))} -> {len(xs)} {axes}"

    def reference(self, *xs: Any) -> Array | QuantizedArray:
        return stacked(xs, np.stack) if isinstance(xs[0], QuantizedArray) else np.stack(xs)

    def torch(self, torch: Any, *xs: Any) -> Any:
        return stacked(xs, torch.stack) if isinstance(xs[0], QuantizedArray) else torch.stack(xs)

    def onnx(self, b: Any, *xs: str) -> Any:
        return b.Concat(*(b.Unsqueeze(x, b.ints(0)) for x in xs), axis=0)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = tuple(draw.size(5) for _ in range(draw.integer(1, 3)))
        arrays = tuple(draw.normal(*shape) for _ in range(draw.integer(1, 4)))
        if len(shape) > 1 and draw.choice(False, True):
            form = str(draw_form(draw))
            return Case(cls(), tuple(Quantize(form).reference(array) for array in arrays))
        return Case(cls(), arrays)


class Transpose(Op):
    """x with its axes in the order ``axes``: axis i of the result is axis ``axes[i]`` of x."""

    name: ClassVar[str] = "transpose"
    axes: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        fits = sorted(self.axes) == list(range(x.rank))
        require(fits, f"axes {list(self.axes)} are not an order of the {x.rank} axes of x {x}")
        return TensorType(x.plain_dtype, tuple(x.shape[axis] for axis in self.axes))

    def factors(self, x: TensorType) -> str:
        names = _names(x.rank).split()
        return f"+{' '.join(names)} -> {' '.join(names[axis] for axis in self.axes)}"

    def reference(self, x: Array) -> Array:
        return x.transpose(self.axes)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.permute(self.axes)

    def onnx(self, b: Any, x: str) -> Any:
        return b.Transpose(x, perm=list(self.axes))

    cost = _only_a_view

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = tuple(draw.size(5) for _ in range(draw.integer(1, 4)))
        order = np.argsort(draw.uniform(0, 1, len(shape)))
        return Case(cls(tuple(int(axis) for axis in order)), (draw.normal(*shape),))


class TakeLast(Op):
    """The last position of x [batch, seq, ...], as [batch, 1, ...]."""

    name: ClassVar[str] = "take_last"
    sharding: ClassVar[str] = "+b s! ... -> b 1 ..."
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("x",)),)

    def infer(self, x: TensorType) -> TensorType:
        require(x.rank >= 2, f"x {x} should be [batch, seq, ...]")
        return TensorType(x.plain_dtype, (x.shape[0], 1, *x.shape[2:]))

    def reference(self, x: Array) -> Array:
        return x[:, -1:]

    def torch(self, torch: Any, x: Any) -> Any:
        return x[:, -1:]

    def onnx(self, b: Any, x: str) -> Any:
        return b.slice(x, 1, -1)

    cost = _only_a_view

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        rest = [draw.size(5) for _ in range(draw.integer(0, 2))]
        return Case(cls(), (draw.normal(draw.integer(1, 3), draw.size(), *rest),))


def _axis(axis: int, name: str, type_: TensorType) -> int:
    """``axis`` counted from the front."""
    if not -type_.rank <= axis < type_.rank:
        raise GraphError(f"{name} {type_} has no axis {axis}")
    return axis % type_.rank


def _without(type_: TensorType, axis: int) -> tuple[Dim, ...]:
    return (*type_.shape[:axis], *type_.shape[axis + 1 :])


def _names(count: int) -> str:
    """So many factors, as a sharding string has them."""
    return " ".join(f"f{i}" for i in range(count))


def _pieces(factors: list[str]) -> str:
    """One axis that is these factors side by side."""
    return f"({'|'.join(factors)})" if len(factors) > 1 else factors[0]


def _regrouped(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """The sharding string of a reshape: an axis that becomes several, or several that become one, keep their factors."""
    left: list[str] = []
    right: list[str] = []
    for number, (old, new) in enumerate(_groups(list(before), list(after))):
        names = [f"g{number}f{position}" for position in range(max(len(old), len(new)))]
        merged = f"({' '.join(names)})"
        if min(len(old), len(new)) == 1:
            left += names if len(new) == 1 else [merged]
            right += [merged] if len(new) == 1 else names
        else:
            left += [f"{name}!" for name in names[: len(old)]]
            right += [f"{name}new!" for name in names[: len(new)]]
    return f"+{' '.join(left)} -> {' '.join(right)}"


def _groups(before: list[int], after: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of sizes, as short as can be, that have the same product before and after."""
    while before or after:
        old, new = before[:1], after[:1]
        before, after = before[1:], after[1:]
        while prod(old) != prod(new):
            if before and (prod(old) < prod(new) or not after):
                old.append(before.pop(0))
            else:
                new.append(after.pop(0))
        yield old, new
