"""Dead code goes, what is needed stays, and the program computes the same."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.dead_code import dead_code_elimination
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.verify import verify
from deltaloom.ops.elementwise import Silu


@given(data=st.data())
def test_the_meaning_stays_and_nothing_unused_is_left(data: st.DataObject, random_graphs: Any, run: Any) -> None:
    graph = data.draw(random_graphs)
    clean = dead_code_elimination(graph)
    verify(clean)
    assert dead_code_elimination(clean) == clean
    before, after = run(graph), run(clean)
    np.testing.assert_array_equal(before.outputs["out"], after.outputs["out"])
    assert before.states.keys() == after.states.keys()
    for name, array in before.states.items():
        np.testing.assert_array_equal(array, after.states[name])
    for body in (clean, *clean.regions.values()):
        used = {value for node in body.nodes for value in node.inputs} | set(body.results)
        assert used.issuperset(body.params)
        for node in body.nodes:
            stateful = isinstance(node.op, Call) and clean.regions[node.op.region].states
            assert stateful or used.intersection(node.outputs)


def test_a_chain_that_nobody_reads_goes(sample: Graph) -> None:
    first, second = Value("first", sample.nodes[0].outputs[0].type), Value("second", sample.nodes[0].outputs[0].type)
    dead = (Node(Silu(), sample.nodes[0].outputs, (first,)), Node(Silu(), (first,), (second,)))
    lost = Value("lost.weight", sample.params[0].type, "param")
    grown = replace(sample, nodes=(*sample.nodes, *dead), params=(*sample.params, lost))
    assert dead_code_elimination(grown) == sample


def test_a_call_stays_for_its_states_only(sample: Graph) -> None:
    unread = replace(sample, outputs=(("hidden", sample.nodes[0].outputs[0]),))
    assert [n.name for n in dead_code_elimination(unread).nodes] == ["embed", "layers.0.out", "layers.1.out"]
    stateless = unread.map_regions(
        lambda r: replace(r, states=(), updates=(), nodes=tuple(n for n in r.nodes if n.name != "twice"))
    )
    layer = stateless.regions["layer"]
    stateless = replace(stateless, regions={"layer": replace(layer, nodes=tuple(n for n in layer.nodes if n.name != "seen_now"))})
    verify(stateless)
    clean = dead_code_elimination(stateless)
    assert [n.name for n in clean.nodes] == ["embed"] and clean.regions == {}
    assert [p.name for p in clean.params] == ["embed.weight"]


def test_weights_of_dropped_parameters_go(sample: Graph) -> None:
    outputs = tuple((p.name, p) for p in sample.params)
    weights = Graph("w", params=sample.params, outputs=outputs)
    unread = replace(sample, outputs=(("hidden", sample.nodes[0].outputs[0]),), weights=weights)
    clean = dead_code_elimination(unread)
    verify(clean)
    assert clean.weights is not None
    assert [name for name, _ in clean.weights.outputs] == ["embed.weight"]
    assert [p.name for p in clean.weights.params] == ["embed.weight"]
