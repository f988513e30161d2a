"""Small rewrite rules and graphs for the tests of the engine."""

from __future__ import annotations

from typing import Any, ClassVar

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32
from deltaloom.passes.pipeline import Event
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Rule

BATCH, SEQ = symbol("batch"), symbol("seq")
X = f32[BATCH, SEQ, 4]


class SiluMul(Rule):
    """silu(gate) * up becomes swiglu(gate, up)."""

    name: ClassVar[str] = "silu_mul"

    def pattern(self, g: Any, gate: Any, up: Any) -> Any:
        return g.mul(g.silu(gate), up)

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.swiglu(m.gate, m.up)


def silu_mul(*, swapped: bool = False) -> tuple[GraphBuilder, Any, Any]:
    """A builder with both nodes of ``SiluMul``, and what they give."""
    g = GraphBuilder("toy")
    gate, up = g.input("gate", X), g.input("up", X)
    with g.scope("mlp"):
        with g.scope("inner"):
            act = g.silu(gate, name="act")
        y = g.mul(up, act, name="y") if swapped else g.mul(act, up, name="y")
    return g, act, y


def ops_of(graph: Graph) -> list[str]:
    """The ops of the nodes, in order."""
    return [node.op.name for node in graph.nodes]


def only(events: list[Event]) -> Event:
    """The one event."""
    (event,) = events
    return event


class SquareOf(Rule):
    """The same input twice."""

    name: ClassVar[str] = "square"

    def pattern(self, g: Any, x: Any) -> Any:
        return g.mul(g.silu(x), x)

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.swiglu(m.x, m.x)


def chain(length: int) -> Graph:
    """``length`` times what ``SquareOf`` takes."""
    g = GraphBuilder("chain")
    x = g.input("x", X)
    for _ in range(length):
        x = g.mul(g.silu(x), x)
    g.output("y", x)
    return g.build()
