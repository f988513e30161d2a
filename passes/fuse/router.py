"""The router and the gate of the shared expert, whose scores are one product after packing."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.op import Draw
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Example, Rule


class FuseGatedRouter(Rule):
    """All columns but the last are routed by; the last one is the shared expert's gate."""

    name: ClassVar[str] = "gated_router"

    def pattern(self, g: Any, logits: Any) -> Any:
        scores, gate = g.split(logits, sizes=(p.Any("experts"), 1))
        weights, ids = g.router_topk(scores, k=p.Any("k"), normalize=p.Any("normalize"))
        return weights, ids, gate

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.gated_router(m.logits, k=m["k"], normalize=m["normalize"])

    def examples(self, draw: Draw) -> Example:
        experts = draw.size(20)
        attributes = {"experts": experts, "k": draw.integer(1, experts), "normalize": draw.choice(True, False)}
        return Example((draw.normal(draw.integer(1, 3), draw.size(), experts + 1).clip(-30, 30),), attributes)
