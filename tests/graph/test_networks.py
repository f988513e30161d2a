"""Graph algorithms through networkx, against plain definitions."""

from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Graph
from deltaloom.graph.networks import critical_path, is_convex, isomorphic_layers, to_networkx
from deltaloom.graph.types import f32


def test_vertices_and_edges(sample: Graph) -> None:
    network = to_networkx(sample.regions["layer"])
    assert list(network)[:4] == ["%x", "@proj.weight", "$total", "$seen"]
    assert network.nodes["%gate"] == {
        "kind": "node",
        "op": "split(sizes=(4, 4), axis=-1)",
        "types": ("f32[batch, seq, 4]", "f32[batch, seq, 4]"),
    }
    assert network.nodes["$seen"] == {"kind": "state", "op": "", "types": ("f32[batch, past, 4]",)}
    assert network.edges["%gate", "%act"]["values"] == ("%gate", "%up")
    assert network.edges["$total", "%twice"]["values"] == ("$total",)
    assert nx.is_directed_acyclic_graph(network)


def test_convexity(sample: Graph) -> None:
    region = sample.regions["layer"]
    of = region.producers
    assert is_convex(region, [of["wide"], of["gate"], of["act"]])
    assert not is_convex(region, [of["wide"], of["act"]]), "the split lies between them"
    assert is_convex(region, [of["twice"], of["out"]])
    with pytest.raises(GraphError, match="%embed is no node of graph 'layer'"):
        is_convex(region, [sample.nodes[0]])


@given(data=st.data())
def test_convex_is_that_a_merged_graph_has_no_cycle(data: st.DataObject, random_graphs: Any) -> None:
    graph = data.draw(random_graphs)
    chosen = data.draw(st.sets(st.sampled_from(graph.nodes), min_size=1, max_size=4))
    place = {v: "merged" if n in chosen else n.name + "!" for n in graph.nodes for v in n.outputs}
    edges = {(place[v], place[n.outputs[0]]) for n in graph.nodes for v in n.inputs if v in place}
    merged = nx.DiGraph([edge for edge in edges if edge != ("merged", "merged")])
    assert is_convex(graph, chosen) == nx.is_directed_acyclic_graph(merged)


def layered() -> GraphBuilder:
    g = GraphBuilder("layered")
    h = g.input("x", f32[2, 4])
    for number in range(4):
        with g.scope(f"layers.{number}"):
            with g.scope("mixer"):
                gate = g.linear(h, g.param("gate.weight", [4, 4]))
                up = g.linear(h, g.param("up.weight", [4, 4]))
                left, right = (up, gate) if number == 2 else (gate, up)
                mixed = g.swiglu(left, right)
            h = g.add(h, mixed) if number != 3 else g.mul(h, mixed)
    g.output("out", h)
    return g


def test_isomorphic_scopes() -> None:
    assert isomorphic_layers(layered().build()) == [
        ("layers.0", "layers.1", "layers.2"),
        ("layers.0.mixer", "layers.1.mixer", "layers.2.mixer", "layers.3.mixer"),
    ]


def test_layers_that_read_their_inputs_in_another_order_differ() -> None:
    g = GraphBuilder("ordered")
    x, y = g.input("x", f32[2, 4]), g.input("y", f32[2, 4])
    for number, (left, right) in enumerate([(x, y), (x, y), (x, x)]):
        with g.scope(f"layers.{number}"):
            inner = g.silu(left)
            g.swiglu(inner, right) if number != 1 else g.swiglu(right, inner)
    g.output("out", x)
    layers = isomorphic_layers(g.build())
    assert layers == [], "1 swaps gate and up, 2 reads one value twice"


def test_calls_are_layers(sample: Graph) -> None:
    assert isomorphic_layers(sample) == [("layers.0", "layers.1")]
    twin = replace(sample.regions["layer"], name="twin")
    other = replace(sample.nodes[2], op=replace(sample.nodes[2].op, region="twin"))  # type: ignore[type-var]
    graph = replace(sample, nodes=(*sample.nodes[:2], other, sample.nodes[3]), regions={**sample.regions, "twin": twin})
    assert isomorphic_layers(graph) == [("layers.0", "layers.1")], "regions count by what they compute, not by name"


def test_the_critical_path(sample: Graph) -> None:
    region = sample.regions["layer"]
    path = critical_path(region, lambda node: {"linear": 5, "add": 3}.get(node.op.name, 1))
    assert path.nodes == ("wide", "gate", "act", "out") and path.cost == 10
    heavy = critical_path(region, lambda node: 100 if node.name == "twice" else 1)
    assert heavy.nodes == ("twice",) and heavy.cost == 100
    assert critical_path(Graph("empty"), lambda node: 1).nodes == ()
    with pytest.raises(GraphError, match="the cost of %wide is -1.0, expected a number that is not negative"):
        critical_path(region, lambda node: -1)


@given(data=st.data())
def test_the_critical_path_is_the_longest_of_all_paths(data: st.DataObject, random_graphs: Any) -> None:
    graph = data.draw(random_graphs)
    costs = {node.name: data.draw(st.integers(0, 9)) for node in graph.nodes}
    network = nx.DiGraph([("start", node.name) for node in graph.nodes])
    made = {v: node.name for node in graph.nodes for v in node.outputs}
    network.add_edges_from((made[v], node.name) for node in graph.nodes for v in node.inputs if v in made)
    for _, target, edge in network.edges(data=True):
        edge["weight"] = costs[target]
    path = critical_path(graph, lambda node: costs[node.name])
    assert path.cost == nx.dag_longest_path_length(network)
    assert path.cost == sum(costs[name] for name in path.nodes)
    assert all(network.has_edge(a, b) for a, b in zip(path.nodes, path.nodes[1:], strict=False))
