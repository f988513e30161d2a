"""Fused elementwise ends of matrix products: the residual sum with its norm, SwiGLU of a packed product."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.errors import require
from deltaloom.graph.op import Case, Draw, Inferred
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops.elementwise import gate_numbers
from deltaloom.ops.fused import Fused
from deltaloom.ops.laws import PermutationEquivariant


class AddRMSNorm(Fused):
    """sum = x + delta, rounded; out = rms_norm(sum, weight).

    x, delta [..., d] of one type; weight as ``rms_norm`` takes it."""

    name: ClassVar[str] = "add_rms_norm"
    outputs: ClassVar[tuple[str, ...]] = ("sum", "out")
    sharding: ClassVar[str] = "... d!, ... d!, d! -> ... d!, ... d!"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("x", "delta")),)
    eps: float
    zero_centred: bool = False

    def infer(self, x: TensorType, delta: TensorType, weight: TensorType) -> Inferred:
        return self.types(x, delta, weight)

    def decompose(self, g: Any, x: Any, delta: Any, weight: Any) -> Any:
        total = g.add(x, delta, name="sum")
        return total, g.rms_norm(total, weight, eps=self.eps, zero_centred=self.zero_centred, name="out")

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        lifted, width = draw.choice(False, True), draw.size(70)
        shape = (draw.size(), draw.size(5), width)
        op = cls(eps=draw.choice(1e-6, 1e-5, 1e-2), zero_centred=lifted)
        arrays = (draw.normal(*shape), draw.normal(*shape), draw.normal(width))
        return Case(op, arrays, (None, None, f32 if lifted else None))


class PackedSwiglu(Fused):
    """silu(gate) * up of both = [gate | up] along the last axis, which has an even size."""

    name: ClassVar[str] = "packed_swiglu"
    sharding: ClassVar[str] = "... (2 f) -> ... f"
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("both",)),)

    def infer(self, both: TensorType) -> Inferred:
        return self.types(both)

    def decompose(self, g: Any, both: Any) -> Any:
        width = both.type.shape[-1] if both.type.rank else 0
        even = isinstance(width, int) and width > 0 and width % 2 == 0
        require(even, f"both {both.type} should have a last axis of even size: gate, then up")
        gate, up = g.split(both, sizes=(width // 2, width // 2), axis=-1, name="gate_up")
        return g.swiglu(gate, up, name="out")

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (gate_numbers(draw, draw.integer(1, 3), draw.size(), 2 * draw.size(20)),))
