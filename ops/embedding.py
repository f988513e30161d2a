"""Row lookup."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType
from deltaloom.ops.signature import Axes, floating, integral


class Embedding(Op):
    """y[..., :] = weight[ids[...], :]; ids are in [0, rows)."""

    name: ClassVar[str] = "embedding"
    sharding: ClassVar[str] = "..., v! h -> ... h"

    def infer(self, ids: TensorType, weight: TensorType) -> TensorType:
        integral("ids", ids)
        axes = Axes()
        axes.bind("weight", weight, "rows hidden")
        return TensorType(floating("weight", weight), (*ids.shape, axes["hidden"]))

    def reference(self, ids: Array, weight: Array) -> Array:
        return weight[ids]

    def torch(self, torch: Any, ids: Any, weight: Any) -> Any:
        return torch.nn.functional.embedding(ids, weight)

    def onnx(self, b: Any, ids: str, weight: str) -> Any:
        return b.Gather(weight, ids, axis=0)

    def reads(self, ids: TensorType, weight: TensorType) -> dict[str, Fraction]:
        return {"weight": Fraction(1, weight.static_shape()[0])}

    def cost(self, ids: TensorType, weight: TensorType) -> Cost:
        return Cost(0, ids.nbytes() + 2 * self.infer(ids, weight).nbytes())

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        rows = draw.size(20)
        ids = draw.integers(0, rows - 1, draw.integer(1, 3), draw.size())
        return Case(cls(), (ids.astype(draw.choice("int64", "int32")), draw.normal(rows, draw.size())))
