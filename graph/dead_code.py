"""Removal of what nothing needs."""

from __future__ import annotations

from dataclasses import replace

from deltaloom.graph.ir import Call, Graph, Node


def dead_code_elimination(graph: Graph) -> Graph:
    """``graph`` without unused nodes, parameters, weights and regions; regions and weight graphs are cleaned too.

    Inputs, outputs and states stay: they are the signature. A call stays if one of its outputs is used or if its region
    has states, because its updates leave the program.
    """
    cleaned = {name: dead_code_elimination(region) for name, region in graph.regions.items()}
    needed = set(graph.results)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        has_states = isinstance(node.op, Call) and bool(graph.region(node.op.region).states)
        if has_states or needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs)
    nodes = tuple(reversed(kept))
    params = tuple(value for value in graph.params if value in needed)
    called = {node.op.region for node in nodes if isinstance(node.op, Call)}
    regions = {name: region for name, region in cleaned.items() if name in called}
    weights = None if graph.weights is None else _needed_weights(graph.weights, {value.name for value in params})
    same_regions = list(regions) == list(graph.regions) and all(graph.regions[name] is region for name, region in regions.items())
    if len(nodes) == len(graph.nodes) and len(params) == len(graph.params) and same_regions and weights is graph.weights:
        return graph  # itself, so that it needs no further look by whoever checked it before
    return replace(graph, nodes=nodes, params=params, regions=regions, weights=weights)


def _needed_weights(weights: Graph, names: set[str]) -> Graph:
    outputs = tuple((name, value) for name, value in weights.outputs if name in names)
    return dead_code_elimination(weights if outputs == weights.outputs else replace(weights, outputs=outputs))
