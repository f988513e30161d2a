"""The gate from which the decay per channel comes (Kimi Team, "Kimi Linear", arXiv 2510.26692, section 4)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType
from deltaloom.ops.laws import PermutationEquivariant
from deltaloom.ops.precision import wide, wide_dtype, wide_tensor
from deltaloom.ops.signature import Axes, floating


class Decay(Op):
    """log_decay = -exp(a_log) * softplus(a + dt_bias), all of it in float32.

    a [batch, seq, heads, dk]; a_log [heads] and dt_bias [heads, dk] in the dtype of a or float32; the result is float32 (float64
    if a is)."""

    name: ClassVar[str] = "kda.decay"
    sharding: ClassVar[str] = "b s h k, h, h k -> b s h k"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("a",)),)

    def infer(self, a: TensorType, a_log: TensorType, dt_bias: TensorType) -> TensorType:
        axes = Axes()
        axes.bind("a", a, "batch seq heads key_dim")
        axes.bind("a_log", a_log, "heads")
        axes.bind("dt_bias", dt_bias, "heads key_dim")
        dtype = floating("a", a)
        for name, type_ in (("a_log", a_log), ("dt_bias", dt_bias)):
            allowed = (dtype, wide_dtype(dtype))
            require(type_.dtype in allowed, f"{name} is {type_}, expected {dtype} as a {a}, or {allowed[1]}")
        return a.with_dtype(wide_dtype(dtype))

    def reference(self, a: Array, a_log: Array, dt_bias: Array) -> Array:
        result: Array = -np.exp(wide(a_log))[:, None] * np.logaddexp(0, wide(a) + wide(dt_bias))
        return result

    def torch(self, torch: Any, a: Any, a_log: Any, dt_bias: Any) -> Any:
        total = wide_tensor(torch, a) + wide_tensor(torch, dt_bias)
        # The default threshold turns linear at 20, which shows in float64.
        softplus = torch.nn.functional.softplus(total, threshold=40.0)
        return -torch.exp(wide_tensor(torch, a_log))[:, None] * softplus

    def cost(self, a: TensorType, a_log: TensorType, dt_bias: TensorType) -> Cost:
        return Cost(8 * a.elements(), self.moved_bytes(a, a_log, dt_bias))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        heads, key_dim = draw.size(), draw.size(17)
        a = draw.normal(draw.integer(1, 3), draw.size(), heads, key_dim, scale=draw.choice(1.0, 30.0))
        return Case(cls(), (a, draw.uniform(-3.0, 3.0, heads), draw.normal(heads, key_dim)))
