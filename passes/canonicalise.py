"""Canonicalise: casts that change nothing go, equal computations are made once, dead code goes."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.graph.dead_code import dead_code_elimination
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Op
from deltaloom.graph.rewriter import Rewriter
from deltaloom.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Bring a graph into its one plain form: no idle casts, no repeated computation, no dead node."""

    name = "canonicalise"
    establishes = ("canonical",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return dead_code_elimination(self.each(graph, ctx))

    def region(self, graph: Graph, ctx: Context) -> Graph:
        rewriter = Rewriter(graph)
        seen: dict[tuple[Op, tuple[Value, ...]], Node] = {}
        changed = False
        for node in graph.nodes:
            inputs = tuple(rewriter.current(value) for value in node.inputs)
            twin = seen.get((node.op, inputs))
            if node.op.name == "cast" and inputs[0].type == node.outputs[0].type:
                rewriter.replace(node.outputs[0], inputs[0])
            elif twin is not None:
                for old, new in zip(node.outputs, twin.outputs, strict=True):
                    rewriter.replace(old, new)
            else:
                if not isinstance(node.op, Call) and not node.op.updates:
                    seen[node.op, inputs] = node
                continue
            rewriter.remove(node)
            changed = True
        return rewriter.result(after=self.name) if changed else graph
