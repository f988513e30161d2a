"""SwiGLU of a packed product."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Draw
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


class FusePackedSwiglu(Rule):
    """The halves of a value, gate and up, go into swiglu and nowhere else."""

    name: ClassVar[str] = "packed_swiglu"

    def pattern(self, g: Any, both: Any) -> Any:
        gate, up = g.split(both, sizes=(p.Any("width"), p.Any("width")))
        return g.swiglu(gate, up)

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.packed_swiglu(m.both)

    def examples(self, draw: Draw) -> Example:
        width = draw.size(33)
        return Example((draw.normal(draw.integer(1, 3), draw.size(), 2 * width),), {"width": width})
