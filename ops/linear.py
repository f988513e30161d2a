"""The matrix product with a weight."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import TensorType
from deltaloom.ops.precision import wide
from deltaloom.ops.quantized import draw_stored, is_weight, plain, plain_tensor
from deltaloom.ops.signature import Axes, floating, has_dtype


class Linear(Op):
    """y[..., o] = sum_i x[..., i] * weight[o, i] + bias[o], summed in float32 and rounded once to the dtype of x.

    A quantised weight means what ``dequantize`` makes of it in the dtype of x, one in bfloat16 its numbers widened to that."""

    name: ClassVar[str] = "linear"
    sharding: ClassVar[str] = "+... i, o i, +o -> ... o"

    def infer(self, x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "... in")
        axes.bind("weight", weight, "out in")
        is_weight("weight", weight, dtype)
        if bias is not None:
            axes.bind("bias", bias, "out")
            has_dtype("bias", bias, dtype, "as x")
        return x.with_shape(*x.shape[:-1], axes["out"])

    def reference(self, x: Array, weight: Array | QuantizedArray, bias: Array | None = None) -> Array:
        y = wide(x) @ wide(plain(weight, x.dtype)).T
        if bias is not None:
            y = y + wide(bias)
        return y.astype(x.dtype)

    def torch(self, torch: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, plain_tensor(torch, weight, x.dtype), bias)

    def onnx(self, b: Any, x: str, weight: str, *bias: str) -> Any:
        rows = b.reshape(b.wide(x), -1, b.Shape(weight, start=1))
        y = b.Gemm(rows, b.wide(weight), *map(b.wide, bias), transB=1)
        leading = b.Shape(x, start=0, end=-1)
        return b.narrow(b.reshape(y, leading, b.Shape(weight, start=0, end=1)), x)

    def cost(self, x: TensorType, weight: TensorType, bias: TensorType | None = None) -> Cost:
        given = (x, weight) if bias is None else (x, weight, bias)
        return Cost(2 * x.elements() * weight.shape[0], self.moved_bytes(*given))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        lead = tuple(draw.size(5) for _ in range(draw.integer(0, 2)))
        out, width = draw.size(), draw.size(70)
        weight = draw.normal(out, width) / np.sqrt(width)
        stored, dtypes = draw_stored(draw, weight)
        bias = draw.choice((), (draw.normal(out),))
        return Case(cls(), (draw.normal(*lead, width), *stored, *bias), (None, *dtypes, *(None for _ in bias)))
