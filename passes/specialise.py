"""Specialise: from one symbolic graph to the programs that run: chosen outputs, one token or many, with or without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deltaloom.graph.dead_code import dead_code_elimination
from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.passes.pipeline import Context, Pass


@dataclass(frozen=True)
class SelectOutputs(Pass):
    """Keep the outputs named and drop what only others need."""

    name = "select_outputs"
    establishes = ("selected",)
    given = ("outputs",)
    outputs: tuple[str, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        chosen = tuple((name, graph.output(name)) for name in self.outputs)
        return dead_code_elimination(replace(graph, outputs=chosen))


@dataclass(frozen=True)
class AssumeUnpadded(Pass):
    """Drop the ``valid`` input for programs whose rows have no padding (not ``padded``): masking by it is the identity then."""

    name = "assume_unpadded"
    establishes = ("padding_decided",)
    given = ("padded",)
    padded: bool = False

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if self.padded:
            return graph
        regions = {name: _without_valid(region) for name, region in graph.regions.items()}
        return dead_code_elimination(_without_valid(replace(graph, regions=regions)))


@dataclass(frozen=True)
class Specialise(Pass):
    """Fix the number of tokens of a step, for programs that decode."""

    name = "specialise"
    establishes = ("specialised",)
    given = ("seq",)
    seq: int | None = None

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return graph if self.seq is None else graph.substitute({"seq": self.seq})


def _without_valid(graph: Graph) -> Graph:
    valid = next((value for value in graph.inputs if value.name == "valid"), None)
    if valid is None:
        return graph
    swap: dict[Value, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(swap.get(value, value) for value in node.inputs)
        if valid in inputs and node.op.name == "mask_padding":
            swap[node.outputs[0]] = inputs[0]
            continue
        rest = tuple(value for value in inputs if value != valid)
        if len(rest) < node.op.arity()[0] and not isinstance(node.op, Call):
            raise CompileError(f"%{node.name} = {node.op.name} needs 'valid' and has no meaning without padding")
        nodes.append(replace(node, inputs=rest))
    return replace(
        graph,
        inputs=tuple(value for value in graph.inputs if value != valid),
        nodes=tuple(nodes),
        outputs=tuple((name, swap.get(value, value)) for name, value in graph.outputs),
    )
