"""Norms over the last axis (Qwen3-Next specification, sections 4 and 5.4)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType, f32, f64
from deltaloom.ops import precision
from deltaloom.ops.elementwise import gate_numbers
from deltaloom.ops.precision import wide, wide_dtype, wide_tensor
from deltaloom.ops.signature import Axes, floating, has_dtype


class RMSNorm(Op):
    """n = x / sqrt(mean(x^2) + eps) in float32; y = weight * cast(n), or cast(n * weight) if ``zero_centred``.

    ``zero_centred=False``: the weight has the dtype of x and multiplies after rounding (Qwen3). ``zero_centred=True``:
    the stored weight was lifted by ``one_plus`` and multiplies in float32, before the one rounding (Qwen3-Next)."""

    name: ClassVar[str] = "rms_norm"
    sharding: ClassVar[str] = "... d!, d! -> ... d!"
    eps: float
    zero_centred: bool = False

    def infer(self, x: TensorType, weight: TensorType) -> TensorType:
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "... width")
        axes.bind("weight", weight, "width")
        if self.zero_centred:
            has_dtype("weight", weight, wide_dtype(dtype), f"(lifted by one_plus) for x {x}")
        else:
            has_dtype("weight", weight, dtype, "as x")
        return x

    def reference(self, x: Array, weight: Array) -> Array:
        f = wide(x)
        n = f / np.sqrt(np.mean(f * f, axis=-1, keepdims=True) + self.eps)
        y: Array = (n * weight).astype(x.dtype) if self.zero_centred else weight * n.astype(x.dtype)
        return y

    def torch(self, torch: Any, x: Any, weight: Any) -> Any:
        f = wide_tensor(torch, x)
        n = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps)
        return (n * weight).to(x.dtype) if self.zero_centred else weight * n.to(x.dtype)

    def onnx(self, b: Any, x: str, weight: str) -> Any:
        if self.zero_centred:
            return b.narrow(_rms_norm(b, b.wide(x), weight), x)
        return _rms_norm(b, x, weight)

    def cost(self, x: TensorType, weight: TensorType) -> Cost:
        return Cost(4 * x.elements(), self.moved_bytes(x, weight))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        lifted = draw.choice(False, True)
        width = draw.size(70)
        x = draw.normal(draw.size(), draw.size(5), width)
        op = cls(eps=draw.choice(1e-6, 1e-5, 1e-2), zero_centred=lifted)
        return Case(op, (x, draw.normal(width)), (None, f32 if lifted else None))


class GatedRMSNorm(Op):
    """cast(float32(weight * cast(n)) * silu(float32(gate))) with n = x / sqrt(mean(x^2) + eps) in float32."""

    name: ClassVar[str] = "gated_rms_norm"
    sharding: ClassVar[str] = "... d!, ... d!, d! -> ... d!"
    eps: float

    def infer(self, x: TensorType, gate: TensorType, weight: TensorType) -> TensorType:
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "... width")
        axes.bind("gate", gate, "... width")
        axes.bind("weight", weight, "width")
        has_dtype("gate", gate, dtype, "as x")
        has_dtype("weight", weight, dtype, "as x")
        return x

    def reference(self, x: Array, gate: Array, weight: Array) -> Array:
        f = wide(x)
        n = f / np.sqrt(np.mean(f * f, axis=-1, keepdims=True) + self.eps)
        scaled = weight * n.astype(x.dtype)
        return (wide(scaled) * precision.silu(wide(gate))).astype(x.dtype)

    def decompose(self, g: Any, x: Any, gate: Any, weight: Any) -> Any:
        dtype = x.type.plain_dtype
        wider = wide_dtype(dtype).long_name
        scaled = g.cast(g.rms_norm(x, weight, eps=self.eps), dtype=wider)
        return g.cast(g.mul(scaled, g.silu(g.cast(gate, dtype=wider))), dtype=dtype.long_name)

    def torch(self, torch: Any, x: Any, gate: Any, weight: Any) -> Any:
        f = wide_tensor(torch, x)
        n = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps)
        scaled = weight * n.to(x.dtype)
        return (scaled * torch.nn.functional.silu(wide_tensor(torch, gate))).to(x.dtype)

    def onnx(self, b: Any, x: str, gate: str, weight: str) -> Any:
        scaled = _rms_norm(b, x, weight)
        f = b.wide(gate)
        return b.narrow(b.Mul(b.wide(scaled), b.silu(f)), x)

    def cost(self, x: TensorType, gate: TensorType, weight: TensorType) -> Cost:
        return Cost(10 * x.elements(), self.moved_bytes(x, gate, weight))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = (draw.size(), draw.size(5), draw.size(70))
        x, gate, weight = draw.normal(*shape), gate_numbers(draw, *shape), draw.uniform(0.5, 1.5, shape[-1])
        x.flat[0] = 1.0
        arrays = (x, gate, weight)
        return Case(cls(eps=draw.choice(1e-6, 1e-2)), arrays)


class L2Norm(Op):
    """x / sqrt(sum(x^2) + eps), in float32; the result stays float32."""

    name: ClassVar[str] = "l2_norm"
    sharding: ClassVar[str] = "... d! -> ... d!"
    eps: float = 1e-6

    def infer(self, x: TensorType) -> TensorType:
        dtype = floating("x", x)
        Axes().bind("x", x, "... width")
        return x.with_dtype(wide_dtype(dtype))

    def reference(self, x: Array) -> Array:
        f = wide(x)
        length: Array = np.sqrt(np.sum(f * f, axis=-1, keepdims=True) + self.eps)
        return f / length

    def torch(self, torch: Any, x: Any) -> Any:
        f = wide_tensor(torch, x)
        return f * torch.rsqrt(f.square().sum(-1, keepdim=True) + self.eps)

    def onnx(self, b: Any, x: str) -> Any:
        return _normalised(b, x, "ReduceSum")

    def cost(self, x: TensorType) -> Cost:
        return Cost(3 * x.elements(), self.moved_bytes(x))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(eps=draw.choice(1e-6, 1e-2)), (draw.normal(draw.size(), draw.size(5), draw.size(70)),))


def _rms_norm(b: Any, x: str, weight: str) -> str:
    """weight * cast(x / sqrt(mean(x^2) + eps)), the quotient in float32."""
    if b.has("RMSNormalization") and b.dtypes[x] != f64:
        made: str = b.RMSNormalization(x, weight, epsilon=b.reference("eps"), axis=-1, stash_type=1)
        return made
    scaled: str = b.Mul(weight, b.narrow(_normalised(b, x, "ReduceMean"), x))
    return scaled


def _normalised(b: Any, x: str, reduce: str) -> str:
    """x / sqrt(mean or sum of x^2 + eps) in float32. ``Pow`` and not ``Mul(x, x)``: runtimes know the norm by it."""
    f = b.wide(x)
    total = b.node(reduce, [b.Pow(f, b.like(2.0, f)), b.ints(-1)], keepdims=1)[0]
    result: str = b.Div(f, b.Sqrt(b.Add(total, b.attribute("eps"))))
    return result
