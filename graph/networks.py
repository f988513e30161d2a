"""Graph algorithms through networkx: an adapter, not a second IR."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import networkx as nx

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Call, Graph, Node


@dataclass(frozen=True)
class Path:
    """A heaviest chain of dependent nodes, by name, and the sum of their costs."""

    nodes: tuple[str, ...]
    cost: float


def to_networkx(graph: Graph) -> nx.DiGraph:
    """The top level or a region as a directed graph. Vertices are named by node (``%x``, its first output), input
    (``%x``), parameter (``@x``) and state (``$x``); each has ``kind``, ``op`` (with attributes; "" for what is declared)
    and ``types`` (printed). Edges go from maker to user and have ``values``, the names that flow."""
    network = nx.DiGraph(name=graph.name)
    declared = [*graph.inputs, *graph.params, *(state.value for state in graph.states)]
    for value in declared:
        network.add_node(str(value), kind=value.kind, op="", types=(str(value.type),))
    maker = {str(value): str(value) for value in declared}
    for node in graph.nodes:
        vertex = str(node.outputs[0])
        network.add_node(vertex, kind="node", op=_label(node), types=tuple(str(v.type) for v in node.outputs))
        for value in node.inputs:
            source = maker[str(value)]
            flows = network.edges.get((source, vertex), {}).get("values", ())
            network.add_edge(source, vertex, values=tuple(dict.fromkeys((*flows, str(value)))))
        maker.update({str(value): vertex for value in node.outputs})
    return network


def is_convex(graph: Graph, nodes: Iterable[Node]) -> bool:
    """Whether no path leaves ``nodes`` and comes back: only then can they become one node."""
    network = to_networkx(graph)
    inside = _vertices(network, graph, nodes)
    outside_after = {user for vertex in inside for user in network.successors(vertex)} - inside
    reached = set(outside_after)
    for vertex in outside_after:
        reached |= nx.descendants(network, vertex)
    return not reached & inside


def isomorphic_layers(graph: Graph) -> list[tuple[str, ...]]:
    """Layers of ``graph`` that compute the same on other values: groups of two or more, in order of use. A layer is a scope
    with all that lies in it (``layers.3``), or a call (told by its prefix). Two are alike if a mapping of their nodes keeps
    ops, attributes, types and the order of inputs; names do not count."""
    groups: list[tuple[nx.DiGraph, list[str]]] = []
    placed: dict[str, list[str]] = {}
    for name, key, nodes in _layers(graph):
        if key in placed:
            placed[key].append(name)
            continue
        body = _body(nodes)
        alike = (members for known, members in groups if _alike(known, body))
        members = next(alike, [])
        if not members:
            groups.append((body, members))
        members.append(name)
        placed[key] = members
    return [tuple(members) for _, members in groups if len(members) > 1]


def critical_path(graph: Graph, cost: Callable[[Node], float]) -> Path:
    """The chain of dependent nodes whose costs, not negative, add up to the most: no number of workers is faster."""
    network = to_networkx(graph)
    network.remove_nodes_from([vertex for vertex, kind in network.nodes(data="kind") if kind != "node"])
    costs = {str(node.outputs[0]): float(cost(node)) for node in graph.nodes}
    for vertex, value in costs.items():
        if not value >= 0:
            raise GraphError(f"the cost of {vertex} is {value}, expected a number that is not negative")
    best: dict[str, tuple[float, str | None]] = {}
    for vertex in nx.lexicographical_topological_sort(network):
        before = [(best[p][0], p) for p in network.predecessors(vertex)]
        most, previous = max(before, default=(0.0, None), key=lambda pair: pair[0])
        best[vertex] = (most + costs[vertex], previous)
    if not best:
        return Path((), 0.0)
    at: str | None = max(best, key=lambda vertex: best[vertex][0])
    total = best[at][0] if at is not None else 0.0
    path: list[str] = []
    while at is not None:
        path.append(at.removeprefix("%"))
        at = best[at][1]
    return Path(tuple(reversed(path)), total)


def _label(node: Node) -> str:
    """Op and attributes; of a call the region only, because its prefix is what tells layers apart."""
    return f"call({node.op.region})" if isinstance(node.op, Call) else str(node.op)


def _vertices(network: nx.DiGraph, graph: Graph, nodes: Iterable[Node]) -> set[str]:
    inside = {str(node.outputs[0]) for node in nodes}
    if strange := sorted(inside - set(network)):
        raise GraphError(f"{strange[0]} is no node of graph '{graph.name}'")
    return inside


def _layers(graph: Graph) -> Iterator[tuple[str, str, list[Node]]]:
    """Name, a key that layers known to be the same share, and nodes of each layer, in order of use."""
    bodies: dict[str, list[Node]] = {}
    calls: dict[str, Call] = {}
    for node in graph.nodes:
        parts = node.scope.split(".") if node.scope else []
        for length in range(1, len(parts) + 1):
            bodies.setdefault(".".join(parts[:length]), []).append(node)
        if isinstance(node.op, Call):
            calls[node.op.prefix.rstrip(".")] = node.op
    for scope, nodes in bodies.items():
        yield scope, f"scope {scope}", nodes
    for prefix, call in calls.items():
        yield prefix, f"region {call.region}", list(graph.region(call.region).nodes)


def _body(nodes: list[Node]) -> nx.DiGraph:
    """The nodes of one scope with what they read; a vertex's ``label`` is what must agree, not its name."""
    body = nx.DiGraph()
    for node in nodes:
        types = ", ".join(str(value.type) for value in node.outputs)
        body.add_node(node.name, label=f"{_label(node)} {types}")
    inner = {str(value): (node.name, index) for node in nodes for index, value in enumerate(node.outputs)}
    for node in nodes:
        for position, value in enumerate(node.inputs):
            source, index = inner.get(str(value), (f"outside {value}", 0))
            if str(value) not in inner:
                kind = value.kind if value.kind in ("param", "state") else "value"
                body.add_node(source, label=f"{kind} {value.type}")
            ports = body.edges.get((source, node.name), {}).get("label", ())
            body.add_edge(source, node.name, label=(*ports, (index, position)))
    return body


def _alike(left: nx.DiGraph, right: nx.DiGraph) -> bool:
    return bool(nx.is_isomorphic(left, right, node_match=_same_label, edge_match=_same_label))


def _same_label(left: dict[str, object], right: dict[str, object]) -> bool:
    return left["label"] == right["label"]
