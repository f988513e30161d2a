"""The gates of the delta rule (Qwen3-Next specification, section 5.3)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType
from deltaloom.ops import precision
from deltaloom.ops.elementwise import gate_numbers
from deltaloom.ops.laws import PermutationEquivariant
from deltaloom.ops.precision import wide, wide_dtype, wide_tensor
from deltaloom.ops.signature import Axes, floating, has_dtype


class DeltaGates(Op):
    """beta = float32(cast(sigmoid(b))); log_decay = -exp(a_log) * softplus(a + dt_bias), all of it in float32.

    b, a [batch, seq, heads]; a_log, dt_bias [heads] in the dtype of b or float32."""

    name: ClassVar[str] = "delta_gates"
    outputs: ClassVar[tuple[str, ...]] = ("beta", "log_decay")
    sharding: ClassVar[str] = "... h, ... h, h, h -> ... h, ... h"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("b", "a")),)

    def infer(
        self, b: TensorType, a: TensorType, a_log: TensorType, dt_bias: TensorType
    ) -> tuple[TensorType, TensorType]:
        axes = Axes()
        axes.bind("b", b, "batch seq heads")
        axes.bind("a", a, "batch seq heads")
        axes.bind("a_log", a_log, "heads")
        axes.bind("dt_bias", dt_bias, "heads")
        dtype = floating("b", b)
        has_dtype("a", a, dtype, "as b")
        for name, type_ in (("a_log", a_log), ("dt_bias", dt_bias)):
            allowed = (dtype, wide_dtype(dtype))
            require(type_.dtype in allowed, f"{name} is {type_}, expected {dtype} as b {b}, or {allowed[1]}")
        gate = b.with_dtype(wide_dtype(dtype))
        return gate, gate

    def reference(self, b: Array, a: Array, a_log: Array, dt_bias: Array) -> tuple[Array, Array]:
        softplus = np.logaddexp(0, wide(a) + wide(dt_bias))
        return wide(precision.sigmoid(b)), -np.exp(wide(a_log)) * softplus

    def torch(self, torch: Any, b: Any, a: Any, a_log: Any, dt_bias: Any) -> Any:
        total = wide_tensor(torch, a) + wide_tensor(torch, dt_bias)
        # The default threshold turns linear at 20, which shows in float64.
        softplus = torch.nn.functional.softplus(total, threshold=40.0)
        return wide_tensor(torch, torch.sigmoid(b)), -torch.exp(wide_tensor(torch, a_log)) * softplus

    def onnx(self, b: Any, b_: str, a: str, a_log: str, dt_bias: str) -> Any:
        beta = b.wide(b.narrow(b.sigmoid(b.wide(b_)), b_))
        softplus = b.Softplus(b.Add(b.wide(a), b.wide(dt_bias)))
        return beta, b.Mul(b.Neg(b.Exp(b.wide(a_log))), softplus)

    def cost(self, b: TensorType, a: TensorType, a_log: TensorType, dt_bias: TensorType) -> Cost:
        return Cost(12 * b.elements(), self.moved_bytes(b, a, a_log, dt_bias))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        shape = (draw.integer(1, 3), draw.size(), draw.size())
        a = draw.normal(*shape, scale=draw.choice(1.0, 30.0))
        return Case(cls(), (gate_numbers(draw, *shape), a, draw.uniform(-3.0, 3.0, shape[2]), draw.normal(shape[2])))
