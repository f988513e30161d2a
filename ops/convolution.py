"""The short causal convolution before the delta rule (Qwen3-Next specification, section 5.2)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType, f32, i64
from deltaloom.ops import precision
from deltaloom.ops.laws import PaddingIsNoOp, PermutationEquivariant, Streaming
from deltaloom.ops.precision import wide
from deltaloom.ops.signature import Axes, floating, has_dtype

FEW = 4
"""Up to so many positions ONNX Runtime's own op is quicker than a product for each tap."""


class CausalConv1d(Op):
    """y[t, c] = sum_j weight[c, 0, j] * u[t + j] of u = state ++ x, in float32, rounded; then silu, if asked, rounded.

    The last tap multiplies the current position. ``state`` holds the last K - 1 columns of x, oldest first."""

    name: ClassVar[str] = "causal_conv1d"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_state")
    updates: ClassVar[dict[str, int]] = {"state": 1}
    sharding: ClassVar[str] = "b s! c, c 1 k!, b c w! -> b s! c, b c w!"
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("x",)),
        PaddingIsNoOp(("x",), zero=("x",), starts_zero=True),
        PermutationEquivariant(("x", "state")),
    )
    activation: str = "none"

    def infer(self, x: TensorType, weight: TensorType, state: TensorType) -> tuple[TensorType, TensorType]:
        require(self.activation in ("none", "silu"), f"activation is '{self.activation}', expected 'none' or 'silu'")
        dtype = floating("x", x)
        axes = Axes()
        axes.bind("x", x, "batch seq channels")
        axes.bind("weight", weight, "channels 1 taps")
        axes.bind("state", state, "batch channels taps-1")
        taps = axes.number("taps")
        require(axes["taps-1"] == taps - 1, f"state {state} should have {taps - 1} columns for weight {weight}")
        has_dtype("weight", weight, dtype, "as x")
        has_dtype("state", state, dtype, "as x")
        return x, state

    def reference(self, x: Array, weight: Array, state: Array) -> tuple[Array, Array]:
        u = np.concatenate([state.transpose(0, 2, 1), x], axis=1)
        seq, taps = x.shape[1], weight.shape[2]
        y = sum(wide(weight[:, 0, j]) * wide(u[:, j : j + seq]) for j in range(taps))
        y = np.asarray(y).astype(x.dtype)
        if self.activation == "silu":
            y = precision.silu(y)
        return y, u[:, seq:].transpose(0, 2, 1)

    def decompose(self, g: Any, x: Any, weight: Any, state: Any) -> Any:
        if self.activation == "none":
            return None
        y, new_state = g.causal_conv1d(x, weight, state)
        return g.silu(y), new_state

    def torch(self, torch: Any, x: Any, weight: Any, state: Any) -> Any:
        u = torch.cat([state, x.transpose(1, 2)], dim=2)
        y = torch.nn.functional.conv1d(u, weight, groups=weight.shape[0]).transpose(1, 2)
        if self.activation == "silu":
            y = torch.nn.functional.silu(y)
        return y, u[:, :, x.shape[1] :]

    def onnx(self, b: Any, x: str, weight: str, state: str) -> Any:
        """The standard op where there is one; else by taps, or, for few tokens, with ONNX Runtime's own, which beyond them is
        slower by a factor of up to 3."""
        if not b.has("CausalConvWithState") or b.dtypes[x] != f32 or b.type(weight).shape[2] == 1:
            return self._by_taps(b, x, weight, state)
        if not b.contrib:
            return self._with_one_op(b, x, weight, state)
        few = b.LessOrEqual(b.scalar(b.size(x, 1)), b.constant(FEW, i64))
        sides = [lambda b, rule=rule: rule(b, x, weight, state) for rule in (self._with_one_op, self._by_taps)]
        return b.branch(few, *sides, b.kind(x, 3), b.kind(state, 3))

    def _with_one_op(self, b: Any, x: str, weight: str, state: str) -> Any:
        """Without its activation: with silu, ONNX Runtime's sigmoid would be in it (see ``Body.sigmoid``)."""
        columns = b.Transpose(x, perm=[0, 2, 1])
        y, new_state = b.newer("CausalConvWithState", columns, weight, "", state, outputs=2)
        y = b.Transpose(y, perm=[0, 2, 1])
        return b.silu(y) if self.activation == "silu" else y, new_state

    def _by_taps(self, b: Any, x: str, weight: str, state: str) -> Any:
        """A product for each tap: ONNX Runtime's Conv over groups of one channel takes four times as long for one token."""
        u = b.Concat(b.Transpose(state, perm=[0, 2, 1]), x, axis=1)
        taps, count = b.type(weight).shape[2], b.size(x, 1)
        rows = b.Split(b.Transpose(b.wide(weight), perm=[2, 1, 0]), axis=0, num_outputs=taps, outputs=taps)
        total = ""
        for tap, row in enumerate(rows if taps > 1 else [rows]):
            part = b.Mul(b.wide(b.slice(u, 1, tap, b.Add(count, b.ints(tap)))), row)
            total = b.Add(total, part) if total else part
        y = b.narrow(total, x)
        if self.activation == "silu":
            y = b.narrow(b.silu(b.wide(y)), x)
        return y, b.Transpose(b.slice(u, 1, count), perm=[0, 2, 1]) if taps > 1 else b.Identity(state)

    def cost(self, x: TensorType, weight: TensorType, state: TensorType) -> Cost:
        silu = 5 if self.activation == "silu" else 0
        return Cost((2 * weight.shape[2] + silu) * x.elements(), self.moved_bytes(x, weight, state))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq, channels = draw.integer(1, 3), draw.choice(1, 2, 3, 5, 63, 64, 65), draw.size()
        taps = draw.choice(4, 1, 2, 3, 9)
        state = draw.normal(batch, channels, taps - 1) * draw.choice(1.0, 0.0)
        weight = draw.normal(channels, 1, taps)
        return Case(cls(draw.choice("none", "silu")), (draw.normal(batch, seq, channels), weight, state))
