"""Ops that treat every element alone."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import LONG_NAMES, TensorType, dtype_named
from deltaloom.ops import precision
from deltaloom.ops.precision import wide, wide_dtype, wide_tensor
from deltaloom.ops.signature import floating


class Add(Op):
    """x + y, of one type."""

    name: ClassVar[str] = "add"
    commutative: ClassVar[bool] = True
    sharding: ClassVar[str] = "+..., +... -> ..."

    def infer(self, x: TensorType, y: TensorType) -> TensorType:
        floating("x", x)
        require(x == y, f"x {x} and y {y} differ; add takes two values of one type")
        return x

    def reference(self, x: Array, y: Array) -> Array:
        return x + y

    def torch(self, torch: Any, x: Any, y: Any) -> Any:
        return x + y

    def onnx(self, b: Any, x: str, y: str) -> Any:
        return b.Add(x, y)

    def cost(self, x: TensorType, y: TensorType) -> Cost:
        return Cost(x.elements(), self.moved_bytes(x, y))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = _shape(draw)
        return Case(cls(), (draw.normal(*shape), draw.normal(*shape)))


class Mul(Op):
    """x * y, of one dtype; the last axis of one of them may be 1 and then counts for all elements of the other's."""

    name: ClassVar[str] = "mul"
    commutative: ClassVar[bool] = True
    sharding: ClassVar[str] = "+... f, ... f -> ... f"

    def infer(self, x: TensorType, y: TensorType) -> TensorType:
        floating("x", x)
        return _spread_last("x", x, "y", y) if x.shape and x.shape[-1] == 1 else _spread_last("y", y, "x", x)

    def reference(self, x: Array, y: Array) -> Array:
        return x * y

    def torch(self, torch: Any, x: Any, y: Any) -> Any:
        return x * y

    def onnx(self, b: Any, x: str, y: str) -> Any:
        return b.Mul(x, y)

    def cost(self, x: TensorType, y: TensorType) -> Cost:
        return Cost(self.infer(x, y).elements(), self.moved_bytes(x, y))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = _shape(draw)
        narrow = (*shape[:-1], draw.choice(shape[-1], 1))
        arrays = (draw.normal(*shape), draw.normal(*narrow))
        return Case(cls(), draw.choice(arrays, arrays[::-1]))


class ZerosLike(Op):
    """Zeros of the type of x."""

    name: ClassVar[str] = "zeros_like"
    sharding: ClassVar[str] = "... -> ..."

    def infer(self, x: TensorType) -> TensorType:
        floating("x", x)
        return x

    def reference(self, x: Array) -> Array:
        return np.zeros_like(x)

    def torch(self, torch: Any, x: Any) -> Any:
        return torch.zeros_like(x)

    def onnx(self, b: Any, x: str) -> Any:
        return b.Expand(b.like(0.0, x), b.Shape(x))

    def cost(self, x: TensorType) -> Cost:
        return Cost(0, x.nbytes())

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (draw.normal(*_shape(draw)),))


class Sigmoid(Op):
    """1 / (1 + exp(-x)), computed in float32 and rounded once."""

    name: ClassVar[str] = "sigmoid"
    sharding: ClassVar[str] = "... -> ..."

    def infer(self, x: TensorType) -> TensorType:
        floating("x", x)
        return x

    def reference(self, x: Array) -> Array:
        return precision.sigmoid(x)

    def torch(self, torch: Any, x: Any) -> Any:
        return torch.sigmoid(x)

    def onnx(self, b: Any, x: str) -> Any:
        return b.narrow(b.sigmoid(b.wide(x)), x)

    def cost(self, x: TensorType) -> Cost:
        return Cost(4 * x.elements(), self.moved_bytes(x))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (gate_numbers(draw, *_shape(draw)),))


class Silu(Op):
    """x * sigmoid(x), computed in float32 and rounded once."""

    name: ClassVar[str] = "silu"
    sharding: ClassVar[str] = "... -> ..."

    def infer(self, x: TensorType) -> TensorType:
        floating("x", x)
        return x

    def reference(self, x: Array) -> Array:
        return precision.silu(x)

    def torch(self, torch: Any, x: Any) -> Any:
        return torch.nn.functional.silu(x)

    def onnx(self, b: Any, x: str) -> Any:
        f = b.wide(x)
        return b.narrow(b.silu(f), x)

    def cost(self, x: TensorType) -> Cost:
        return Cost(5 * x.elements(), self.moved_bytes(x))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (gate_numbers(draw, *_shape(draw)),))


class Swiglu(Op):
    """silu(gate) * up: silu in float32 and rounded, the product in the model dtype."""

    name: ClassVar[str] = "swiglu"
    sharding: ClassVar[str] = "..., ... -> ..."

    def infer(self, gate: TensorType, up: TensorType) -> TensorType:
        floating("gate", gate)
        require(gate == up, f"gate {gate} and up {up} differ; swiglu takes two values of one type")
        return up

    def reference(self, gate: Array, up: Array) -> Array:
        return precision.silu(gate) * up

    def decompose(self, g: Any, gate: Any, up: Any) -> Any:
        return g.mul(g.silu(gate), up)

    def torch(self, torch: Any, gate: Any, up: Any) -> Any:
        return torch.nn.functional.silu(gate) * up

    def onnx(self, b: Any, gate: str, up: str) -> Any:
        f = b.wide(gate)
        return b.Mul(b.narrow(b.silu(f), gate), up)

    def cost(self, gate: TensorType, up: TensorType) -> Cost:
        return Cost(6 * up.elements(), self.moved_bytes(gate, up))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = _shape(draw)
        return Case(cls(), (gate_numbers(draw, *shape), draw.normal(*shape)))


class SigmoidGate(Op):
    """x * sigmoid(gate): sigmoid rounded to the model dtype, the product in it; the last axis of gate may be 1."""

    name: ClassVar[str] = "sigmoid_gate"
    sharding: ClassVar[str] = "+... f, ... f -> ... f"

    def infer(self, x: TensorType, gate: TensorType) -> TensorType:
        floating("x", x)
        return _spread_last("gate", gate, "x", x)

    def reference(self, x: Array, gate: Array) -> Array:
        return x * precision.sigmoid(gate)

    def decompose(self, g: Any, x: Any, gate: Any) -> Any:
        return g.mul(x, g.sigmoid(gate))

    def torch(self, torch: Any, x: Any, gate: Any) -> Any:
        return x * torch.sigmoid(gate)

    def onnx(self, b: Any, x: str, gate: str) -> Any:
        return b.Mul(x, b.narrow(b.sigmoid(b.wide(gate)), gate))

    def cost(self, x: TensorType, gate: TensorType) -> Cost:
        return Cost(x.elements() + 4 * gate.elements(), self.moved_bytes(x, gate))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = _shape(draw)
        x = draw.normal(*shape)
        x.flat[0] = 1.0
        return Case(cls(), (x, gate_numbers(draw, *shape[:-1], draw.choice(shape[-1], 1))))


class OnePlus(Op):
    """1 + float32(weight): the weight of a zero-centred norm, lifted to float32."""

    name: ClassVar[str] = "one_plus"
    sharding: ClassVar[str] = "... -> ..."

    def infer(self, weight: TensorType) -> TensorType:
        return weight.with_dtype(wide_dtype(floating("weight", weight)))

    def reference(self, weight: Array) -> Array:
        return 1 + wide(weight)

    def torch(self, torch: Any, weight: Any) -> Any:
        return 1 + wide_tensor(torch, weight)

    def onnx(self, b: Any, weight: str) -> Any:
        f = b.wide(weight)
        return b.Add(f, b.like(1.0, f))

    def cost(self, weight: TensorType) -> Cost:
        return Cost(weight.elements(), self.moved_bytes(weight))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (draw.normal(*_shape(draw)),))


class Cast(Op):
    """x rounded to ``dtype`` (a long name: "float32", "bfloat16"), ties to even."""

    name: ClassVar[str] = "cast"
    sharding: ClassVar[str] = "... -> ..."
    dtype: str

    def infer(self, x: TensorType) -> TensorType:
        require(self.dtype in LONG_NAMES, f"cast to '{self.dtype}': the dtypes are {', '.join(LONG_NAMES)}")
        target = LONG_NAMES[self.dtype]
        whole = x.plain_dtype.kind != "float" or target.kind == "float"
        require(whole, f"cast of {x} to {target} loses its fraction")
        return x.with_dtype(target)

    def reference(self, x: Array) -> Array:
        return x.astype(dtype_named(self.dtype).numpy)

    def torch(self, torch: Any, x: Any) -> Any:
        return x.to(getattr(torch, self.dtype))

    def onnx(self, b: Any, x: str) -> Any:
        return b.cast(x, LONG_NAMES[self.dtype])

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = _shape(draw)
        if draw.choice(False, True):
            array: Array = draw.integers(-100, 100, *shape).astype(np.int32)
            return Case(cls(draw.choice("float32", "bfloat16", "int64")), (array,))
        return Case(cls(draw.choice("float32", "bfloat16", "float16", "float64")), (draw.normal(*shape),))


def gate_numbers(draw: Draw, *shape: int) -> Array:
    """Arguments of a sigmoid, some of them extreme; the first one is ordinary, since errors of a kernel are judged relative to
    the largest element, and a sigmoid may be exact to a unit of 1 only."""
    numbers = draw.normal(*shape, scale=draw.choice(1.0, 30.0))
    numbers.flat[0] = 1.0
    return numbers


def _spread_last(name: str, type_: TensorType, whole_name: str, whole: TensorType) -> TensorType:
    """``whole``, if the other input has its type or a last axis of 1 instead of its own."""
    fits = type_.shape == whole.shape or (type_.rank == whole.rank > 0 and type_.shape == (*whole.shape[:-1], 1))
    fits = fits and type_.dtype == whole.dtype
    require(fits, f"{name} {type_} neither is like {whole_name} {whole} nor has 1 as its last axis")
    return whole


def _shape(draw: Draw) -> tuple[int, ...]:
    return tuple(draw.size(70 if axis == 0 else 5) for axis in range(draw.integer(1, 3)))[::-1]
