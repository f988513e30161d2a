"""An op that is as it should be, under the name of each plugin that needs one."""

from typing import Any, ClassVar

from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.types import TensorType
from deltaloom.ops.signature import floating


class Twice(Op):
    """2 x."""

    name: ClassVar[str] = ""
    sharding: ClassVar[str] = "... -> ..."

    def infer(self, x: TensorType) -> TensorType:
        floating("x", x)
        return x

    def reference(self, x: Array) -> Array:
        result: Array = x * x.dtype.type(2)
        return result

    def torch(self, torch: Any, x: Any) -> Any:
        return x * 2

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (draw.normal(draw.size(), draw.size()),))


class FutureTwice(Twice):
    """2 x."""

    name: ClassVar[str] = "broken_future.twice"


class PathTwice(Twice):
    """2 x."""

    name: ClassVar[str] = "broken_path.twice"


class KernelTwice(Twice):
    """2 x."""

    name: ClassVar[str] = "broken_kernel.twice"
