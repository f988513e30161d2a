"""Lift weights: what depends on parameters alone moves into the weight graph, which runs once at load."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class LiftWeights(Pass):
    """Split every graph into a program whose parameters are ready to use and a weight graph that makes them from the
    checkpoint's."""

    name = "lift_weights"
    requires = ("canonical",)
    establishes = ("lifted",)
    excludes = ("lifted",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return self.each(graph, ctx)

    def region(self, graph: Graph, ctx: Context) -> Graph:
        constant: set[Value] = set(graph.params)
        lifted: list[Node] = []
        kept: list[Node] = []
        for node in graph.nodes:
            if node.inputs and not isinstance(node.op, Call) and constant.issuperset(node.inputs):
                constant.update(node.outputs)
                lifted.append(node)
            else:
                kept.append(node)
        used = [value for node in kept for value in node.inputs] + list(graph.results)
        border = [value for value in dict.fromkeys(used) if value in constant]
        made = {value: replace(value, kind="param") for value in border}
        swap = {value: made.get(value, value) for value in used}
        needed = _needed(lifted, border)
        read = {value for node in needed for value in node.inputs}.union(border)
        weights = Graph(
            f"{graph.name}.weights",
            params=tuple(p for p in graph.params if p in read),
            nodes=tuple(needed),
            outputs=tuple((value.name, value) for value in border),
        )
        return replace(
            graph,
            params=tuple(made.values()),
            nodes=tuple(replace(n, inputs=tuple(swap[v] for v in n.inputs)) for n in kept),
            outputs=tuple((name, swap[value]) for name, value in graph.outputs),
            weights=weights,
        )


def _needed(nodes: list[Node], wanted: list[Value]) -> list[Node]:
    live = set(wanted)
    kept = []
    for node in reversed(nodes):
        if live.intersection(node.outputs):
            live.update(node.inputs)
            kept.append(node)
    return kept[::-1]
