"""What a program has to do and to move for given sizes: the ops' ``cost`` rules, summed over its bodies.

The rules are asked with numbers in place of symbols, so that those whose cost is no polynomial (which experts a few tokens reach)
can tell it exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

from deltaloom.graph.errors import GraphError, require
from deltaloom.graph.ir import Call, Graph, Node
from deltaloom.graph.op import Cost
from deltaloom.graph.types import DType, f32


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved, as numbers."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.bytes * times)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes if self.bytes else inf if self.flops else 0.0


@dataclass(frozen=True)
class NodeWork:
    """A node of a body and what one run of it costs; ``dtype`` is the one that it computes in."""

    body: str
    node: Node
    dtype: DType
    work: Work


@dataclass(frozen=True)
class GraphWork:
    """Every node of the top level and of each region that is called, and how often each body runs."""

    nodes: tuple[NodeWork, ...]
    calls: Mapping[str, int]

    @property
    def total(self) -> Work:
        """Of the whole graph, each body as often as it runs."""
        return sum((one.work * self.calls[one.body] for one in self.nodes), start=Work())

    def body(self, name: str) -> Work:
        """Of one run of a body."""
        return sum((one.work for one in self.nodes if one.body == name), start=Work())


def graph_work(graph: Graph, sizes: Mapping[str, int]) -> GraphWork:
    """The work of ``graph`` where ``sizes`` gives a number for each of its symbols: ``batch``; ``past``, the tokens that states
    already hold; ``seq``, the new tokens of each sequence, where that is not fixed. Raises ``GraphError`` for a size that is
    missing or outside its bounds."""
    for name, symbol in graph.symbols().items():
        known = ", ".join(f"{key} {value}" for key, value in sizes.items()) or "none"
        require(name in sizes, f"graph '{graph.name}' has the size {name}, for which no number is given; given are {known}")
        fits = sizes[name] >= symbol.low and (symbol.high is None or sizes[name] <= symbol.high)
        require(fits, f"{name} is {sizes[name]}, expected {symbol.low} to {'any' if symbol.high is None else symbol.high}")
    bodies = {instance.graph.name: instance.graph for instance in graph.instances()}
    calls = Counter(instance.graph.name for instance in graph.instances())
    nodes = [work for name, body in bodies.items() for work in _body_work(name, body, sizes)]
    return GraphWork(tuple(nodes), dict(calls))


def node_work(node: Node, sizes: Mapping[str, int]) -> Work:
    """What one node costs; ``GraphError`` if a size of it is not given."""
    cost: Cost = node.op.cost(*(value.type.substitute(sizes) for value in node.inputs))
    if not isinstance(cost.flops, int) or not isinstance(cost.bytes, int):
        raise GraphError(f"the cost of %{node.name} = {node.op.name} is {cost.flops} operations and {cost.bytes} bytes, no numbers")
    return Work(cost.flops, cost.bytes)


def _body_work(name: str, body: Graph, sizes: Mapping[str, int]) -> Iterator[NodeWork]:
    for node in body.nodes:
        if not isinstance(node.op, Call):
            yield NodeWork(name, node, _float_dtype(node), node_work(node, sizes))


def _float_dtype(node: Node) -> DType:
    found = (value.type.dtype for value in node.outputs)
    return next((dtype for dtype in found if isinstance(dtype, DType) and dtype.kind == "float"), f32)
