"""Every kind of damage to a graph is caught, with the sentence that says what is wrong and the lines around it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import VerifyError
from deltaloom.graph.ir import Call, Graph, Node, State, Value, names_apart
from deltaloom.graph.types import bf16, f32
from deltaloom.graph.verify import verify
from deltaloom.models.inventory import parameter_count
from deltaloom.ops.elementwise import Add, Silu
from deltaloom.ops.norm import RMSNorm

BATCH, SEQ, PAST = symbol("batch"), symbol("seq", 1, 64), symbol("past", 0)
PLAIN = f32[BATCH, SEQ, 4]


def node(graph: Graph, name: str, **changes: Any) -> Graph:
    """The graph with fields of the node ``name`` replaced."""
    return replace(graph, nodes=tuple(replace(n, **changes) if n.name == name else n for n in graph.nodes))


def layer(graph: Graph, change: Callable[[Graph], Graph]) -> Graph:
    return graph.map_regions(change)


def without(graph: Graph, name: str) -> Graph:
    return replace(graph, nodes=tuple(n for n in graph.nodes if n.name != name))


def value(graph: Graph, name: str) -> Value:
    return next(v for n in graph.nodes for v in n.outputs if v.name == name)


def state(graph: Graph, name: str, **changes: Any) -> Graph:
    return replace(graph, states=tuple(replace(s, **changes) if s.name == name else s for s in graph.states))


def call(name: str, region: str, prefix: str, given: Value) -> Node:
    return Node(Call(region=region, prefix=prefix), (given,), (Value(name, PLAIN),))


def with_nodes(graph: Graph, *nodes: Node) -> Graph:
    return replace(graph, nodes=(*graph.nodes, *nodes))


def shrunk(region: Graph) -> Graph:
    """The append state gets fewer columns than it has."""
    seen = Value("seen", f32[BATCH, PAST + SEQ, 4], "state")
    kept = without(region, "seen_now")
    return replace(state(kept, "seen", value=seen), updates=(region.updates[0], ("seen", X)))


def owned_total(graph: Graph) -> Graph:
    """The top level owns a state with the name of one of a layer."""
    update = Node(Add(), (TOTAL.value, TOTAL.value), (TWICE,))
    return replace(with_nodes(graph, update), states=(TOTAL,), updates=((TOTAL.name, TWICE),))


def weighted(graph: Graph, *outputs: tuple[str, Value]) -> Graph:
    """The graph with a weight graph that gives ``outputs``."""
    return replace(graph, weights=Graph("w", params=graph.params, outputs=outputs))


EMBED = Value("embed", PLAIN)
X = Value("x", PLAIN, "input")
OTHER = Graph("other", inputs=(X,), outputs=(("out", X),))
TOTAL = State(Value("layers.1.total", f32[BATCH, 4], "state"))
TWICE = Value("twice", f32[BATCH, 4])

DAMAGES: list[tuple[str, Callable[[Graph], Graph]]] = [
    ("%layers.0.out uses %embed, which is not defined", lambda g: without(g, "embed")),
    (
        "%layers.0.out uses %layers.1.out, which is used before it is defined",
        lambda g: node(g, "layers.0.out", inputs=(value(g, "layers.1.out"),)),
    ),
    (
        "%norm uses %layers.1.out as bf16[batch, seq, 4], but it was defined as f32[batch, seq, 4]",
        lambda g: node(g, "norm", inputs=(Value("layers.1.out", bf16[BATCH, SEQ, 4]), g.params[1])),
    ),
    (
        "%norm uses %layers.1.out as input, but it was defined as node",
        lambda g: node(g, "norm", inputs=(Value("layers.1.out", PLAIN, "input"), g.params[1])),
    ),
    (
        "%norm has type bf16[batch, seq, 4], but rms_norm gives f32[batch, seq, 4]",
        lambda g: node(g, "norm", outputs=(Value("norm", bf16[BATCH, SEQ, 4]),)),
    ),
    (
        "%norm is refused: op rms_norm takes 2 inputs (x, weight), got 1",
        lambda g: node(g, "norm", inputs=(value(g, "layers.1.out"),)),
    ),
    ("%gate has 1 outputs, but split gives 2", lambda g: layer(g, lambda r: node(r, "gate", outputs=r.nodes[1].outputs[:1]))),
    ("%embed is defined twice", lambda g: node(g, "layers.0.out", outputs=(EMBED,))),
    ("%ids is defined twice", lambda g: node(g, "embed", outputs=(Value("ids", PLAIN),))),
    ("@norm.weight is defined twice", lambda g: replace(g, params=(*g.params, g.params[1]))),
    ("$total is defined twice", lambda g: layer(g, lambda r: replace(r, states=(r.states[0], *r.states)))),
    ("the node name '' is not legal", lambda g: node(g, "norm", outputs=(Value("", PLAIN),))),
    ("the node name 'a b' is not legal", lambda g: node(g, "norm", outputs=(Value("a b", PLAIN),))),
    ("the graph name 'two words' is not legal", lambda g: replace(g, name="two words")),
    ("the output name '' is not legal", lambda g: replace(g, outputs=(("", EMBED),))),
    ("output 'hidden' is given twice", lambda g: replace(g, outputs=g.outputs * 2)),
    ("output 'hidden' uses %lost, which is not defined", lambda g: replace(g, outputs=(("hidden", Value("lost", PLAIN)),))),
    (
        "@ids is declared with the inputs, but calls itself a param",
        lambda g: replace(g, inputs=(replace(g.inputs[0], kind="param"),)),
    ),
    (
        "@made is made by a node, but calls itself a param",
        lambda g: with_nodes(g, Node(Silu(), (EMBED,), (Value("made", PLAIN, "param"),))),
    ),
    ("silu has no outputs", lambda g: with_nodes(g, Node(Silu(), (EMBED,), ()))),
    (
        "attribute 'eps' of %norm = rms_norm is a float64; expected numbers",
        lambda g: node(g, "norm", op=RMSNorm(eps=np.float64(1e-6))),
    ),
    ("attribute 'eps' of %norm = rms_norm is not a number", lambda g: node(g, "norm", op=RMSNorm(eps=float("nan")))),
    ("calls region 'none', which does not exist; there is layer", lambda g: with_nodes(g, call("a", "none", "a.", EMBED))),
    ("gives 2 inputs to region 'layer', which takes 1", lambda g: node(g, "layers.0.out", inputs=(EMBED, EMBED))),
    (
        "gives %ids: i64[batch, seq] to region 'layer', whose input is %x: f32[batch, seq, 4]",
        lambda g: node(g, "layers.0.out", inputs=g.inputs),
    ),
    (
        "%layers.0.out has 2 outputs, but region 'layer' gives 1",
        lambda g: node(g, "layers.0.out", outputs=(value(g, "layers.0.out"), Value("more", PLAIN))),
    ),
    (
        "%layers.1.out and %layers.0.out share the prefix 'layers.0.'",
        lambda g: node(g, "layers.1.out", op=Call(region="layer", prefix="layers.0.")),
    ),
    ("%layers.1.out shares state 'layers.1.total' with the top level", owned_total),
    (
        "%layers.0.out has parameter 'layers.0.proj.weight' as f32[8, 4], another use as f32[4]",
        lambda g: replace(g, params=(*g.params, Value("layers.0.proj.weight", f32[(4,)], "param"))),
    ),
    (
        "calls region 'layer' from a region; calls do not nest",
        lambda g: layer(g, lambda r: with_nodes(r, call("a", "layer", "a.", X))),
    ),
    ("region 'layer' owns regions itself", lambda g: layer(g, lambda r: replace(r, regions={"other": OTHER}))),
    ("the region called 'layer' names itself 'other'", lambda g: layer(g, lambda r: replace(r, name="other"))),
    ("region 'layer' has no outputs", lambda g: layer(g, lambda r: replace(r, outputs=()))),
    ("region 'other' is never called", lambda g: replace(g, regions={**g.regions, "other": OTHER})),
    ("state 'total' is never updated", lambda g: layer(g, lambda r: replace(r, updates=r.updates[1:]))),
    ("state 'total' is updated twice", lambda g: layer(g, lambda r: replace(r, updates=(*r.updates, r.updates[0])))),
    ("'out' is updated, but is no state", lambda g: layer(g, lambda r: replace(r, updates=(*r.updates, ("out", X))))),
    (
        "state 'total' is f32[batch, 4] and of fixed size, but its update is f32[batch, seq, 4]",
        lambda g: layer(g, lambda r: replace(r, updates=(("total", X), r.updates[1]))),
    ),
    (
        "state 'seen' is f32[batch, past + seq, 4] and grows along axis 1, but its update is f32[batch, seq, 4]",
        lambda g: layer(g, shrunk),
    ),
    (
        "grows along axis 0, but its update is f32[batch, past + seq, 4]",
        lambda g: layer(g, lambda r: state(r, "seen", append_axis=0)),
    ),
    ("state 'seen': f32[batch, past, 4] has no axis 3 to append to", lambda g: layer(g, lambda r: state(r, "seen", append_axis=3))),
    (
        "symbol 'batch' is 2 or more in %extra: f32[batch], but 1 or more before",
        lambda g: replace(g, inputs=(*g.inputs, Value("extra", f32[(symbol("batch", 2),)], "input"))),
    ),
    (
        "symbol 'seq' is 1 to 9 in %extra: f32[seq], but 1 to 64 before",
        lambda g: replace(g, inputs=(*g.inputs, Value("extra", f32[(symbol("seq", 1, 9),)], "input"))),
    ),
    ("the weight graph 'w' does not give @embed.weight", lambda g: replace(g, weights=Graph("w"))),
    (
        "the weight graph 'w' gives 'lost', which is no parameter",
        lambda g: weighted(g, *((p.name, p) for p in g.params), ("lost", g.params[0])),
    ),
    (
        "the weight graph 'w' gives 'embed.weight' as f32[4], not f32[7, 4]",
        lambda g: weighted(g, ("embed.weight", g.params[1]), ("norm.weight", g.params[1])),
    ),
    ("has inputs or states; it may have parameters only", lambda g: replace(g, weights=Graph("w", inputs=g.inputs))),
    (
        "graph 'w': output 'a' uses @embed.weight, which is not defined",
        lambda g: replace(g, weights=Graph("w", outputs=(("a", g.params[0]),))),
    ),
]


def test_the_sample_is_legal(sample: Graph) -> None:
    verify(sample)
    verify(sample.regions["layer"])


@pytest.mark.parametrize(("sentence", "damage"), DAMAGES, ids=[sentence[:50] for sentence, _ in DAMAGES])
def test_damage_is_caught(sample: Graph, sentence: str, damage: Callable[[Graph], Graph]) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(damage(sample))
    assert sentence in str(caught.value)


def test_the_error_shows_pass_place_neighbours_and_history(sample: Graph) -> None:
    broken = node(sample, "layers.1.out", outputs=(Value("layers.1.out", f32[BATCH, SEQ, 5]),), origins=("old", "older"))
    with pytest.raises(VerifyError) as caught:
        verify(broken, after="fuse")
    first, *rest = str(caught.value).split("\n")
    assert first == (
        "graph 'sample' after pass 'fuse': %layers.1.out has type f32[batch, seq, 5], but region 'layer' gives f32[batch, seq, 4]"
    )
    assert [line[:23].rstrip() for line in rest] == [
        "    %embed: f32[batch,",
        "    %layers.0.out: f32[",
        "  > %layers.1.out: f32[",
        "    %norm: f32[batch, s",
        "    hidden = %norm",
        "  built at models/sampl",
    ]
    assert rest[0].endswith("# model") and rest[4].endswith("# output")
    assert rest[5] == "  built at models/sample.py:12, replaced %old, %older"


def test_a_fault_in_a_region_says_so(sample: Graph) -> None:
    with pytest.raises(VerifyError, match="^region 'layer' of 'sample': %twice uses \\$total as"):
        verify(layer(sample, lambda r: node(r, "twice", inputs=(Value("total", f32[BATCH, 5], "state"),) * 2)))


def test_an_append_state_may_stay_as_it_is(sample: Graph) -> None:
    def keep(region: Graph) -> Graph:
        seen = region.states[1].value
        return replace(without(region, "seen_now"), updates=(region.updates[0], ("seen", seen)))

    verify(layer(sample, keep))


@given(data=st.data())
def test_random_graphs_are_legal_and_random_damage_is_not(data: st.DataObject, random_graphs: Any) -> None:
    graph = data.draw(random_graphs)
    verify(graph)
    used = {v for n in graph.nodes for v in n.inputs} | set(graph.results)
    victims = [n for n in graph.nodes if used.intersection(n.outputs)]
    assume(victims)
    victim = data.draw(st.sampled_from(victims))
    kind = data.draw(st.sampled_from(["lost", "twice", "retyped", "renamed", "last first"]))
    others = [n for n in graph.nodes if n is not victim]
    first = victim.outputs[0]
    damaged = {
        "lost": others,
        "twice": [*others, victim, victim],
        "retyped": [replace(victim, outputs=(replace(first, type=bf16[(3,)]), *victim.outputs[1:]))],
        "renamed": [
            replace(n, outputs=tuple(replace(v, name=v.name + ".x") for v in n.outputs)) if n is victim else n for n in graph.nodes
        ],
        "last first": [graph.nodes[-1], *graph.nodes[:-1]],
    }[kind]
    made = {v for n in graph.nodes[:-1] for v in n.outputs}
    assume(kind != "last first" or made.intersection(graph.nodes[-1].inputs))
    with pytest.raises(VerifyError):
        verify(replace(graph, nodes=tuple(damaged)))


def test_a_node_that_has_passed_is_looked_at_again_where_it_stands(sample: Graph) -> None:
    """Types of a node are checked once; that its inputs are there, and its name is free, in every graph that it gets into."""
    verify(sample)
    region = sample.regions["layer"]
    rest = tuple(node for node in region.nodes if node.name != "act")
    with pytest.raises(VerifyError, match="uses %act, which is not defined"):
        verify(replace(sample, regions={"layer": replace(region, nodes=rest)}))
    twice = (*region.nodes, region.nodes[0])
    with pytest.raises(VerifyError, match="is defined twice"):
        verify(replace(sample, regions={"layer": replace(region, nodes=twice)}))


def test_names_that_prefixes_keep_apart() -> None:
    def model(prefixes: tuple[str, ...], shared: str = "top") -> Graph:
        inner = GraphBuilder("layer")
        inner.output("y", inner.mul(inner.input("x", f32[2]), inner.param("weight", [2])))
        layer = inner.build()
        g = GraphBuilder("model")
        x = g.mul(g.input("x", f32[2]), g.param(shared, [2]))
        for prefix in prefixes:
            x = g.call(layer, x, prefix=prefix)
        g.output("y", x)
        return g.build()

    assert names_apart(model(("a.", "b.", "a1.")))
    assert not names_apart(model(("a.", "a.b.")))
    assert not names_apart(model(("a.", "b."), shared="b.weight"))
    assert not names_apart(model(("a.",)), model(("a.",)))
    assert parameter_count(model(("a.", "b."))) == 6 and parameter_count(model(("a.", "b."), shared="b.weight")) == 4
    assert parameter_count(model(("a.",)), model(("a.",))) == 4
