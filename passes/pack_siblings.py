"""Pack siblings: linears that read the same value become one linear and a split, their weights one weight."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.registry import ops
from deltaloom.graph.rewriter import Rewriter
from deltaloom.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class PackSiblings(Pass):
    """Replace linears without bias that share an input by one wide linear; changes the layout of weights, so it runs before
    they are lifted. Measured on NumPy: 5 to 7 % of a decode step of tiny-next, where calls are what costs."""

    name = "pack_siblings"
    requires = ("canonical",)
    establishes = ("packed",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return self.each(graph, ctx)

    def region(self, graph: Graph, ctx: Context) -> Graph:
        groups = [group for group in siblings(graph) if len(group) > 1]
        if not groups:
            return graph
        rewriter = Rewriter(graph)
        for group in groups:
            _pack(rewriter, group)
        return rewriter.result(after=self.name)


def siblings(graph: Graph) -> list[list[Node]]:
    """Linears without bias whose weight depends on parameters alone, grouped by their input, in order."""
    constant: set[Value] = set(graph.params)
    groups: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if node.inputs and not isinstance(node.op, Call) and constant.issuperset(node.inputs):
            constant.update(node.outputs)
        elif node.op.name == "linear" and len(node.inputs) == 2 and node.inputs[1] in constant:
            groups.setdefault(node.inputs[0], []).append(node)
    return list(groups.values())


def _pack(rewriter: Rewriter, group: list[Node]) -> None:
    first = group[0]
    base = "_".join(dict.fromkeys(node.name.rpartition(".")[2] for node in group))
    scope = first.scope + "." if first.scope else ""
    sizes = tuple(node.inputs[1].type.static_shape()[0] for node in group)
    concat = ops.get("concat")(axis=0)  # type: ignore[call-arg]
    split = ops.get("split")(sizes=sizes, axis=-1)  # type: ignore[call-arg]
    weights = [node.inputs[1] for node in group]
    weight = rewriter.insert(concat, weights, name=f"{scope}{base}.weight", before=first, replaces=group)
    packed = rewriter.insert(first.op, [first.inputs[0], weight], name=f"{scope}{base}", before=first, replaces=group)
    names = [f"{node.name}.part" for node in group]
    parts = rewriter.insert_all(split, [packed], names=names, before=first, replaces=group)
    for node, part in zip(group, parts, strict=True):
        rewriter.replace(node.outputs[0], part)
        rewriter.remove(node)
