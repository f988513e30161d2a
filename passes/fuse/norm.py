"""The residual sum and the norm of it."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Draw
from deltaloom.graph.types import f32
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


class FuseAddRMSNorm(Rule):
    """A sum and its norm become one op, which gives both."""

    name: ClassVar[str] = "add_rms_norm"

    def pattern(self, g: Any, x: Any, delta: Any, weight: Any) -> Any:
        total = g.add(x, delta)
        return total, g.rms_norm(total, weight, eps=p.Any("eps"), zero_centred=p.Any("zero_centred"))

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.add_rms_norm(m.x, m.delta, m.weight, eps=m["eps"], zero_centred=m["zero_centred"])

    def examples(self, draw: Draw) -> Example:
        lifted, shape = draw.choice(False, True), (draw.integer(1, 3), draw.size(), draw.size(70))
        arrays = (draw.normal(*shape), draw.normal(*shape), draw.normal(shape[-1]))
        attributes = {"eps": draw.choice(1e-6, 1e-2), "zero_centred": lifted}
        return Example(arrays, attributes, (None, None, f32 if lifted else None))
