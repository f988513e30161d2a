"""How long the values of a graph are needed."""

from __future__ import annotations

from deltaloom.graph.ir import Graph, Value


def last_uses(graph: Graph) -> dict[str, list[Value]]:
    """Node name -> the values made by nodes of the graph that nothing reads after it: read there for the last time, or never.
    Results of the graph have no end."""
    kept = {*graph.results, *graph.inputs, *graph.params, *(state.value for state in graph.states)}
    last = {value: node.name for node in graph.nodes for value in (*node.outputs, *node.inputs)}
    found: dict[str, list[Value]] = {}
    for value, node in last.items():
        if value not in kept:
            found.setdefault(node, []).append(value)
    return found
