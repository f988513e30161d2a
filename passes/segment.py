"""Segment: neighbouring nodes of one backend run together; where a value crosses a border there is a ``transfer`` node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from deltaloom.graph.ir import Call, Graph, Node, Placement, Value
from deltaloom.graph.registry import ops
from deltaloom.passes.pipeline import Context, Pass

TRANSFER = "transfer"


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring nodes of one backend that compiles: the emitted function ``name`` takes ``inputs`` (weights among them;
    append states as ``Appended``) and gives the tuple of ``results``."""

    name: str
    backend: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    results: tuple[Value, ...]


@runtime_checkable
class RunsSegments(Protocol):
    """A backend that compiles the nodes of a segment rather than the Python function that was emitted for it."""

    def segment(self, segment: Segment) -> Callable[..., Any]:
        """What is called in place of the emitted function, with the same arguments and results."""


@dataclass(frozen=True)
class Transfers(Pass):
    """Make every crossing between backends explicit. What enters and leaves a graph lives on the first configured backend;
    weights and states live where they are used."""

    name = "transfers"
    requires = ("assigned",)
    establishes = ("segmented",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return self.each(graph, ctx)

    def region(self, graph: Graph, ctx: Context) -> Graph:
        if not graph.nodes:
            return graph
        home = ctx.backends[0].name
        where: dict[Value, str] = dict.fromkeys(graph.inputs, home)
        copies: dict[tuple[Value, str], Value] = {}
        nodes: list[Node] = []

        def fetch(value: Value, backend: str, near: Node) -> Value:
            source = where.get(value)
            if source is None or source == backend:
                return value
            if (value, backend) not in copies:
                copy = Value(f"{value.name}.on_{backend}", value.type)
                op = ops.get(TRANSFER)(source=source, target=backend)  # type: ignore[call-arg]
                place = Placement(backend, f"{backend}.{TRANSFER}")
                nodes.append(Node(op, (value,), (copy,), near.scope, near.source, (value.name,), place))
                where[copy] = backend
                copies[value, backend] = copy
            return copies[value, backend]

        for node in graph.nodes:
            backend = home if isinstance(node.op, Call) or node.placement is None else node.placement.backend
            nodes.append(replace(node, inputs=tuple(fetch(value, backend, node) for value in node.inputs)))
            where.update(dict.fromkeys(node.outputs, backend))
        outputs = tuple((name, fetch(value, home, graph.nodes[-1])) for name, value in graph.outputs)
        return replace(graph, nodes=tuple(nodes), outputs=outputs)


def runs(graph: Graph) -> list[tuple[str | None, list[Node]]]:
    """The nodes cut into neighbours of one backend; a call stands alone, with None."""
    found: list[tuple[str | None, list[Node]]] = []
    for node in graph.nodes:
        crosses = isinstance(node.op, Call) or node.op.name == TRANSFER
        backend = None if crosses or node.placement is None else node.placement.backend
        if backend is not None and found and found[-1][0] == backend:
            found[-1][1].append(node)
        else:
            found.append((backend, [node]))
    return found
