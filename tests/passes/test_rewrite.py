"""The rewrite engine: what matches, what does not and why, and what a rewrite leaves."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from toy_rules import BATCH, SEQ, SiluMul, SquareOf, X, chain, only, ops_of, silu_mul

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32
from deltaloom.passes.fuse.convolution import FuseConvSilu
from deltaloom.passes.pipeline import Fuel
from deltaloom.passes.rewrite import pattern as p
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.match import Match
from deltaloom.passes.rewrite.rule import Rule


@pytest.mark.parametrize("swapped", [False, True])
def test_a_commutative_op_matches_in_both_orders(swapped: bool) -> None:
    g, _, y = silu_mul(swapped=swapped)
    g.output("y", y)
    graph = g.build()
    after, events = apply_rules(graph, [SiluMul()])
    (node,) = after.nodes
    assert node.op.name == "swiglu" and [str(value) for value in node.inputs] == ["%gate", "%up"]
    assert only(events).kind == "hit"
    arrays = {name: np.random.default_rng(1).standard_normal((2, 3, 4)) for name in ("gate", "up")}
    want, found = (interpret(one, arrays, lambda name: None, {}).outputs["y"] for one in (graph, after))
    np.testing.assert_array_equal(found, want)


def test_the_replacement_keeps_name_scope_source_and_origins() -> None:
    g, _, y = silu_mul()
    g.output("out", g.silu(y, name="last"))
    graph = g.build()
    after, _ = apply_rules(graph, [SiluMul()])
    node = after.producers["mlp.y"]
    assert (node.scope, node.origins) == ("mlp", ("mlp.y", "mlp.inner.act"))
    assert node.source == graph.producers["mlp.y"].source
    assert [n.name for n in after.nodes] == ["mlp.y", "last"]


def test_an_inner_value_that_a_node_uses_is_refused() -> None:
    g, act, y = silu_mul()
    g.output("y", g.add(y, act, name="sum"))
    after, events = apply_rules(g.build(), [SiluMul()])
    assert "swiglu" not in ops_of(after)
    assert str(only(events)) == "refused: silu_mul at mlp.y of 'toy': %mlp.inner.act is also used by %sum = add"


def test_an_inner_value_that_leaves_the_graph_is_refused() -> None:
    g, act, y = silu_mul()
    g.output("y", y)
    g.output("act", act)
    _, events = apply_rules(g.build(), [SiluMul()])
    assert only(events).reason == "%mlp.inner.act also leaves the graph as 'act'"


def test_an_inner_value_that_updates_a_state_is_refused() -> None:
    g = GraphBuilder("stateful")
    gate, state = g.input("gate", X), g.state("memory", X)
    act = g.silu(gate, name="act")
    g.update(memory=act)
    g.output("y", g.mul(act, state, name="y"))
    _, events = apply_rules(g.build(), [SiluMul()])
    assert only(events).reason == "%act also leaves the graph as 'memory'"


def test_inputs_may_be_parameters_and_states_and_the_same_value() -> None:
    g = GraphBuilder("any")
    state, weight = g.state("memory", f32[4]), g.param("w", [4])
    g.update(memory=g.mul(g.silu(state), weight))
    g.output("square", g.mul(g.silu(weight), weight))
    after, _ = apply_rules(g.build(), [SiluMul()])
    assert ops_of(after) == ["swiglu", "swiglu"]


def test_an_input_that_the_pattern_uses_twice_must_be_one_value() -> None:
    g, _, y = silu_mul()
    g.output("y", y)
    _, events = apply_rules(g.build(), [SquareOf()])
    found = "%mlp.inner.act = silu has %gate, where the pattern has %up again"
    assert (only(events).kind, only(events).reason) == ("near miss", found)


def test_a_near_miss_says_which_op_is_there_instead() -> None:
    g = GraphBuilder("other")
    gate, up = g.input("gate", X), g.input("up", X)
    g.output("y", g.mul(g.sigmoid(gate, name="s"), up, name="y"))
    _, events = apply_rules(g.build(), [SiluMul()])
    assert str(only(events)) == "near miss: silu_mul at y of 'other': %s is made by sigmoid, where the pattern has silu"


class Norm(Rule):
    """Attributes: one bound twice, one mentioned, one that is left to its default."""

    name: ClassVar[str] = "norms"

    def pattern(self, g: Any, x: Any, a: Any, b: Any) -> Any:
        return g.rms_norm(g.rms_norm(x, a, eps=p.Any("eps")), b, eps=p.Any("eps"))

    def rewrite(self, g: Any, m: Match) -> Any:
        return g.rms_norm(m.x, g.mul(m.a, m.b), eps=m["eps"])


def norms(first: float, second: float, *, zero_centred: bool = False) -> Graph:
    g = GraphBuilder("norms")
    x, a, b = g.input("x", X), g.param("a", [4]), g.param("b", [4])
    inner = g.rms_norm(x, a, eps=first, zero_centred=zero_centred, name="inner")
    g.output("y", g.rms_norm(inner, b, eps=second, name="outer"))
    return g.build()


def test_attributes_are_bound_compared_and_default() -> None:
    after, events = apply_rules(norms(1e-6, 1e-6), [Norm()])
    assert ops_of(after) == ["mul", "rms_norm"] and after.nodes[1].op.attributes()["eps"] == 1e-6
    assert events[0].kind == "hit"
    after, events = apply_rules(norms(1e-5, 1e-6), [Norm()])
    assert ops_of(after) == ["rms_norm", "rms_norm"]
    assert "eps of %inner = rms_norm is 1e-05, but 'eps' is 1e-06 before" in [event.reason for event in events][1]
    _, events = apply_rules(norms(1e-6, 1e-6, zero_centred=True), [Norm()])
    assert "zero_centred of %inner = rms_norm is True, where the pattern has False" in [event.reason for event in events][1]


def conv(*, twice: bool = False) -> Graph:
    g = GraphBuilder("conv")
    x, weight = g.input("x", f32[BATCH, SEQ, 4]), g.param("w", [4, 1, 3])
    state = g.state("conv", f32[BATCH, 4, 2])
    y, new = g.causal_conv1d(x, weight, state, name="c")
    g.update(conv=new)
    g.output("y", g.silu(y, name="y"))
    if twice:
        g.output("z", g.silu(new, name="z"))
    return g.build()


@pytest.mark.parametrize("twice", [False, True])
def test_a_pattern_with_two_outputs_replaces_both(twice: bool) -> None:
    """An output of the pattern may be used by anything: by another node, as an output and as an update."""
    after, events = apply_rules(conv(twice=twice), [FuseConvSilu()])
    assert events[0].kind == "hit" and ops_of(after) == ["causal_conv1d"] + ["silu"] * twice
    assert after.nodes[0].op.attributes()["activation"] == "silu"
    assert [value.name for value in after.nodes[0].outputs] == ["y", "c.new_state"]
    assert str(dict(after.updates)["conv"]) == "%c.new_state"


class TwoLinears(Rule):
    """Two linears of one input, found from the first to the second through that input."""

    name: ClassVar[str] = "two_linears"

    def pattern(self, g: Any, x: Any, a: Any, b: Any) -> Any:
        return g.linear(x, a), g.linear(x, b)

    def rewrite(self, g: Any, m: Match) -> Any:
        both = g.linear(m.x, g.concat(m.a, m.b, axis=0))
        rows = m.a.type.shape[0], m.b.type.shape[0]
        return g.split(both, sizes=rows)


def test_an_input_that_comes_from_an_output_is_refused() -> None:
    """The second weight is computed from the first result, so the two cannot become one."""
    g = GraphBuilder("loop")
    x, a = g.input("x", f32[4, 4]), g.param("a", [4, 4])
    first = g.linear(x, a, name="first")
    g.output("y", g.linear(x, g.silu(first), name="second"))
    after, events = apply_rules(g.build(), [TwoLinears()])
    assert ops_of(after) == ["linear", "silu", "linear"]
    assert {event.kind for event in events} == {"refused"}
    assert "an input is computed from %first, which the pattern itself computes" in events[0].reason


def test_users_of_an_earlier_result_move_behind_the_replacement() -> None:
    g = GraphBuilder("order")
    x, a, b = g.input("x", f32[4, 4]), g.param("a", [4, 4]), g.param("b", [4, 4])
    early = g.silu(g.linear(x, a, name="first"), name="early")
    g.output("y", g.add(early, g.linear(x, b, name="second")))
    after, _ = apply_rules(g.build(), [TwoLinears()])
    assert ops_of(after) == ["concat", "linear", "split", "silu", "add"]
    assert [value.name for value in after.nodes[2].outputs] == ["second", "first"]


class Checked(SiluMul):
    name: ClassVar[str] = "checked"

    def check(self, m: Match) -> str | None:
        return f"the width {m.up.type.shape[-1]} is too small"


def test_a_check_refuses_with_its_reason() -> None:
    g, _, y = silu_mul()
    g.output("y", y)
    after, events = apply_rules(g.build(), [Checked()])
    assert ops_of(after) == ["silu", "mul"]
    assert str(only(events)) == "refused: checked at mlp.y of 'toy': the width 4 is too small"
    after, events = apply_rules(g.build(), [Checked(), SiluMul()])
    assert ops_of(after) == ["swiglu"] and only(events).rule == "silu_mul"


class OptionalBias(Rule):
    """A linear with or without a bias under silu."""

    name: ClassVar[str] = "optional"

    def pattern(self, g: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return g.silu(g.linear(x, weight, bias))

    def rewrite(self, g: Any, m: Match) -> Any:
        y = g.linear(m.x, m.weight, m.bias)
        return g.mul(y, g.sigmoid(y))


@pytest.mark.parametrize("bias", [False, True])
def test_an_optional_input_may_be_absent(bias: bool) -> None:
    g = GraphBuilder("bias")
    x, weight = g.input("x", f32[BATCH, 4]), g.param("w", [3, 4])
    more = (g.param("b", [3]),) if bias else ()
    g.output("y", g.silu(g.linear(x, weight, *more)))
    after, events = apply_rules(g.build(), [OptionalBias()])
    assert ops_of(after) == ["linear", "sigmoid", "mul"] and len(after.nodes[0].inputs) == 2 + bias
    assert only(events).kind == "hit"


def test_rules_apply_until_nothing_changes_and_fuel_stops_them() -> None:
    after, events = apply_rules(chain(5), [SquareOf()])
    assert ops_of(after) == ["swiglu"] * 5 and len(events) == 5
    fuel = Fuel(2)
    after, events = apply_rules(chain(5), [SquareOf()], fuel)
    assert ops_of(after) == ["swiglu"] * 2 + ["silu", "mul"] * 3
    assert [event.kind for event in events] == ["hit", "hit", "out of fuel"] and fuel.left == 0
    again, _ = apply_rules(chain(5), [SquareOf()], Fuel(2))
    assert again == after
