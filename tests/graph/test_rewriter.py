"""Edits through the rewriter: names stay, origins are recorded, the meaning is what the edit says, illegal edits are refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.errors import GraphError, VerifyError
from deltaloom.graph.ir import Graph, Node
from deltaloom.graph.order import topological
from deltaloom.graph.rewriter import Rewriter, common_scope
from deltaloom.graph.types import bf16, f32
from deltaloom.ops.elementwise import Add, Cast, Mul, Silu
from deltaloom.ops.shape import Split


@pytest.fixture
def region(sample: Graph) -> Graph:
    return sample.regions["layer"]


def named(graph: Graph, name: str) -> Node:
    return graph.producers[name]


def test_replace_an_op_by_another(region: Graph) -> None:
    old = named(region, "act")
    rewriter = Rewriter(region)
    new = rewriter.insert(Mul(), old.inputs, name="product", before=old)
    rewriter.replace(old.outputs[0], new)
    rewriter.remove(old)
    result = rewriter.result()
    node = named(result, "product")
    assert [n.name for n in result.nodes] == ["wide", "gate", "product", "seen_now", "twice", "out"]
    assert (node.scope, node.origins, node.outputs[0].type) == ("mixer", ("act",), old.outputs[0].type)
    assert [str(v) for v in named(result, "out").inputs] == ["%x", "%product"]
    assert [str(v) for v in named(result, "seen_now").inputs] == ["$seen", "%product"]
    assert "act" in region.producers, "the original stays as it is"


def test_the_order_of_replace_and_remove_does_not_matter(region: Graph) -> None:
    old = named(region, "act")
    rewriter = Rewriter(region)
    rewriter.remove(old)
    rewriter.replace(old.outputs[0], old.inputs[0])
    result = rewriter.result()
    assert [str(v) for v in named(result, "out").inputs] == ["%x", "%gate"]


def test_removing_a_used_node_is_refused(region: Graph) -> None:
    rewriter = Rewriter(region)
    rewriter.remove(named(region, "act"))
    with pytest.raises(GraphError, match="%act was removed from graph 'layer', but %seen_now still uses it"):
        rewriter.result()
    rewriter = Rewriter(region)
    rewriter.remove(named(region, "twice"))
    with pytest.raises(GraphError, match="%twice was removed from graph 'layer', but the update of state 'total' still uses it"):
        rewriter.result()
    with pytest.raises(GraphError, match="has no node %twice; it was removed or belongs to another graph"):
        rewriter.remove(named(region, "twice"))


def test_a_replaced_node_is_not_mistaken_for_its_successor(region: Graph) -> None:
    gate, act = named(region, "gate"), named(region, "act")
    rewriter = Rewriter(region)
    rewriter.replace(act.outputs[0], gate.outputs[0])
    rewriter.remove(act)
    assert "gate" in rewriter.result().producers


def test_a_value_may_be_wrapped(region: Graph) -> None:
    act = named(region, "act").outputs[0]
    rewriter = Rewriter(region)
    inner = rewriter.insert(Silu(), [act], name="inner")
    outer = rewriter.insert(Silu(), [inner], name="outer")
    rewriter.replace(act, outer)
    result = rewriter.result()
    assert named(result, "inner").inputs == (act,)
    assert [str(v) for v in named(result, "out").inputs] == ["%x", "%outer"]
    order = [n.name for n in result.nodes]
    assert order == ["wide", "gate", "act", "twice", "inner", "outer", "seen_now", "out"], "users move behind the new value"


def test_outputs_and_updates_are_replaced_too(region: Graph) -> None:
    twice, out = named(region, "twice").outputs[0], named(region, "out").outputs[0]
    rewriter = Rewriter(region)
    rewriter.replace(out, named(region, "act").outputs[0])
    rewriter.replace(twice, region.states[0].value)
    result = rewriter.result()
    assert str(result.output("out")) == "%act"
    assert dict(result.updates)["total"] == region.states[0].value


def test_types_must_agree(region: Graph) -> None:
    rewriter = Rewriter(region)
    with pytest.raises(GraphError, match=r"%act: f32\[batch, seq, 4\] cannot be replaced by %wide: f32\[batch, seq, 8\]"):
        rewriter.replace(named(region, "act").outputs[0], named(region, "wide").outputs[0])
    with pytest.raises(GraphError, match="add takes two values of one type"):
        rewriter.insert(Add(), [named(region, "act").outputs[0], named(region, "wide").outputs[0]], name="sum")


def test_names_are_unique(region: Graph) -> None:
    rewriter = Rewriter(region)
    act = named(region, "act")
    new = [rewriter.insert(Silu(), act.inputs[:1], name="act", before=act) for _ in range(2)]
    several = rewriter.insert_all(Split(sizes=(2, 2), axis=-1), [new[0]], names=["gate", "x"])
    assert [v.name for v in new] == ["act_2", "act_3"]
    assert [v.name for v in several] == ["gate_2", "x_2"]
    rewriter.remove(act)
    rewriter.replace(act.outputs[0], new[0])
    assert rewriter.insert(Silu(), [new[1]], name="act").name == "act", "a removed name is free"
    rewriter.result()
    with pytest.raises(GraphError, match="op split has 2 outputs, but the names a were given"):
        rewriter.insert(Split(sizes=(2, 2), axis=-1), [new[0]], name="a")


def test_change_keeps_names_and_follows_types(region: Graph) -> None:
    rewriter = Rewriter(region)
    (low,) = rewriter.change(named(region, "twice"), Cast(dtype="bfloat16"), [region.states[0].value])
    assert (low.name, low.type.dtype) == ("twice", bf16)
    with pytest.raises(VerifyError, match="of fixed size, but its update is bf16"):
        rewriter.result()
    (back,) = rewriter.change(named(region, "twice"), Mul(), [region.states[0].value] * 2)
    assert back == named(region, "twice").outputs[0]
    result = rewriter.result()
    assert named(result, "twice").op == Mul() and named(result, "twice").origins == ("twice",)
    with pytest.raises(GraphError, match="%gate has 2 outputs and silu gives 1"):
        rewriter.change(named(region, "gate"), Silu(), [region.inputs[0]])


def test_rename(region: Graph) -> None:
    rewriter = Rewriter(region)
    new = rewriter.rename(named(region, "act").outputs[0], "mixed")
    rewriter.rename(region.inputs[0], "h")
    assert rewriter.insert(Silu(), [new], name="act", before=named(region, "act")).name == "act_2"
    result = rewriter.result()
    assert [str(v) for v in named(result, "out").inputs] == ["%h", "%mixed"]
    assert named(result, "mixed").origins == ("act",) and str(result.inputs[0]) == "%h"
    with pytest.raises(GraphError, match="the name is taken"):
        rewriter.rename(named(region, "out").outputs[0], "gate")
    with pytest.raises(GraphError, match="the names of parameters and states are the model's"):
        rewriter.rename(region.params[0], "weight")


def test_inputs_parameters_and_outputs(region: Graph) -> None:
    rewriter = Rewriter(region)
    extra = rewriter.add_input("extra", region.inputs[0].type)
    weight = rewriter.add_param("other.weight", region.params[0].type)
    assert rewriter.add_param("other.weight", region.params[0].type) is weight
    wide = named(region, "wide")
    rewriter.change(wide, wide.op, [extra, weight])
    rewriter.remove_param(region.params[0])
    rewriter.set_output("gate", named(region, "gate").outputs[0])
    result = rewriter.result()
    assert [v.name for v in result.inputs] == ["x", "extra"] and result.params == (weight,)
    assert [name for name, _ in result.outputs] == ["out", "gate"]
    with pytest.raises(GraphError, match="cannot get an input 'gate': the name is taken"):
        rewriter.add_input("gate", region.inputs[0].type)
    with pytest.raises(GraphError, match=r"parameter 'other.weight' is f32\[8, 4\] and is now asked for as f32\[4\]"):
        rewriter.add_param("other.weight", f32[(4,)])
    rewriter = Rewriter(region)
    rewriter.remove_param(region.params[0])
    with pytest.raises(GraphError, match="@proj.weight was removed from graph 'layer', but %wide still uses it"):
        rewriter.result()


def test_regions_change_with_their_calls(sample: Graph) -> None:
    first = Rewriter(sample.regions["layer"])
    first.set_output("act", named(sample.regions["layer"], "act").outputs[0])
    rewriter = Rewriter(sample)
    rewriter.set_regions({"layer": first.result()})
    with pytest.raises(VerifyError, match="after pass 'widen': %layers.0.out has 1 outputs, but region 'layer' gives 2"):
        rewriter.result(after="widen")
    call = named(sample, "layers.0.out")
    out, act = rewriter.insert_all(call.op, call.inputs, names=["layers.0.new", "layers.0.act"], before=call)
    assert out.type == act.type == call.outputs[0].type


def test_origins_lead_to_the_first_graph(region: Graph) -> None:
    gate, act = named(region, "gate"), named(region, "act")
    rewriter = Rewriter(region)
    rewriter.insert(Silu(), act.inputs[:1], name="one", before=act, replaces=[gate, act])
    second = Rewriter(rewriter.result())
    second.insert(Silu(), act.inputs[:1], name="two", before=named(rewriter.result(), "one"))
    assert named(second.result(), "two").origins == ("gate", "up", "act")


def test_a_cycle_is_refused(region: Graph) -> None:
    act, wide = named(region, "act"), named(region, "wide")
    around = [replace(n, inputs=(act.outputs[0], n.inputs[1])) if n is wide else n for n in region.nodes]
    with pytest.raises(GraphError, match="the nodes form a cycle, so they have no order: %wide <- %act <- %gate <- %wide"):
        topological(around)


@given(data=st.data())
def test_any_order_is_sorted_and_a_right_one_stays(data: st.DataObject, random_graphs: Any) -> None:
    nodes = data.draw(random_graphs).nodes
    assert topological(nodes) == nodes
    again = topological(data.draw(st.permutations(nodes)))
    assert sorted(n.name for n in again) == sorted(n.name for n in nodes)
    places = {value: index for index, node in enumerate(again) for value in node.outputs}
    assert all(places[v] < index for index, node in enumerate(again) for v in node.inputs if v in places)


@given(data=st.data())
def test_wrapping_by_an_identity_changes_nothing(data: st.DataObject, random_graphs: Any, run: Any) -> None:
    graph = data.draw(random_graphs)
    rewriter = Rewriter(graph)
    chosen = data.draw(st.sets(st.sampled_from(graph.nodes), max_size=3))
    for node in (n for n in graph.nodes if n in chosen):
        value = node.outputs[-1]
        rewriter.replace(value, rewriter.insert(Cast(dtype="float32"), [value], name=f"{value.name}.same"))
    result = rewriter.result()
    assert len(result.nodes) == len(graph.nodes) + len(chosen)
    before, after = run(graph), run(result)
    np.testing.assert_array_equal(before.outputs["out"], after.outputs["out"])
    assert before.states.keys() == after.states.keys()
    for name, array in before.states.items():
        np.testing.assert_array_equal(array, after.states[name])


def test_an_input_may_stand_behind_another_and_outputs_be_exchanged(region: Graph) -> None:
    rewriter = Rewriter(region)
    new = rewriter.add_input("delta", region.inputs[0].type, after=region.inputs[0])
    rewriter.set_outputs({"x": new, "kept": named(region, "act").outputs[0]})
    result = rewriter.result()
    assert [value.name for value in result.inputs][:2] == [region.inputs[0].name, "delta"]
    assert [(name, str(value)) for name, value in result.outputs] == [("x", "%delta"), ("kept", "%act")]


def test_a_new_node_has_the_scope_that_the_replaced_ones_share(region: Graph) -> None:
    nodes = [replace(named(region, "act"), scope=scope) for scope in ("mlp.shared.gate", "mlp.shared", "mlp.router")]
    assert [common_scope(nodes[:count]) for count in (1, 2, 3)] == ["mlp.shared.gate", "mlp.shared", "mlp"]
    assert common_scope([*nodes, named(region, "out")]) == "" == common_scope([])
    rewriter = Rewriter(region)
    act, gate = named(region, "act"), named(region, "gate")
    made = rewriter.insert(Silu(), gate.inputs[:1], name="made", before=named(region, "out"), replaces=[act, gate])
    node = named(rewriter.result(), made.name)
    assert (node.scope, node.source, node.origins) == (common_scope([act, gate]), act.source, ("act", "gate", "up"))
