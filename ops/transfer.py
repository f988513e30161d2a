"""Movement of a value between backends."""

from typing import Any, ClassVar

from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.types import TensorType


class Transfer(Op):
    """y = x, on another backend; the transfers pass puts it where a value crosses a border."""

    name: ClassVar[str] = "transfer"
    sharding: ClassVar[str | None] = "+... -> ..."
    source: str
    target: str

    def infer(self, x: TensorType) -> TensorType:
        return x

    def reference(self, x: Array) -> Array:
        return x

    def torch(self, torch: Any, x: Any) -> Any:
        return x

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(source="numpy", target="torch"), (draw.normal(draw.size(), draw.size()),))
