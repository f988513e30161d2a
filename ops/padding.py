"""Padded positions."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType, bool_
from deltaloom.ops.laws import Idempotent, PermutationEquivariant, Streaming
from deltaloom.ops.signature import Axes, floating, has_dtype


class MaskPadding(Op):
    """x[b, t] where the last seq columns of valid [batch, past + seq] hold at (b, t), else 0."""

    name: ClassVar[str] = "mask_padding"
    sharding: ClassVar[str] = "+b s! ..., b all! -> b s! ..."
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("x",), prefix=("valid",)),
        PermutationEquivariant(("x", "valid")),
        Idempotent(),
    )

    def infer(self, x: TensorType, valid: TensorType) -> TensorType:
        floating("x", x)
        axes = Axes()
        axes.bind("x", x, "batch seq ...")
        axes.bind("valid", valid, "batch past+seq")
        has_dtype("valid", valid, bool_, "for a mask")
        require(valid.shape[1] >= x.shape[1], f"valid {valid} has fewer columns than x {x} has positions")
        return x

    def reference(self, x: Array, valid: Array) -> Array:
        seq = x.shape[1]
        now = valid[:, valid.shape[1] - seq :].reshape(x.shape[0], seq, *[1] * (x.ndim - 2))
        return np.where(now, x, np.zeros((), x.dtype))

    def torch(self, torch: Any, x: Any, valid: Any) -> Any:
        now = valid[:, valid.shape[1] - x.shape[1] :]
        return x.masked_fill(~now[(..., *[None] * (x.dim() - 2))], 0)

    def onnx(self, b: Any, x: str, valid: str) -> Any:
        now = b.slice(valid, 1, b.Neg(b.size(x, 1)))
        rest = [1] * (b.type(x).rank - 2)
        return b.Where(b.reshape(now, b.size(x, 0), b.size(x, 1), *rest), x, b.like(0.0, x))

    def cost(self, x: TensorType, valid: TensorType) -> Cost:
        return Cost(x.elements(), self.moved_bytes(x, valid))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, past, seq = draw.integer(1, 3), draw.choice(0, 1, 7), draw.size()
        x = draw.normal(batch, seq, *(draw.size(5) for _ in range(draw.integer(0, 2))))
        return Case(cls(), (x, left_padded(draw, batch, past + seq)))


def left_padded(draw: Draw, batch: int, columns: int) -> Array:
    """A mask whose rows start with 0 to ``columns`` (all) invalid positions."""
    starts = draw.integers(0, columns, batch)
    return np.arange(columns) >= starts[:, None]
