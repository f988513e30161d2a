"""Border fusion: the new signature of layer bodies, what stands around their calls, and bodies that are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.types import f32
from deltaloom.passes.border_fusion import BorderFusion, find_border
from deltaloom.passes.fuse.passes import Fuse
from deltaloom.passes.pipeline import Context, Event, Fuel
from deltaloom.passes.specialise import SelectOutputs

X = f32[symbol("batch"), symbol("seq"), 4]
Body = Callable[[Any, Value, Value], Value | tuple[Value, ...]]


def body(inside: Body, name: str = "layer") -> Graph:
    g = GraphBuilder(name)
    results = inside(g, g.input("x", X), g.param("norm", [4]))
    for position, value in enumerate(results if isinstance(results, tuple) else (results,)):
        g.output(f"out{position}" if position else "out", value)
    return g.build()


def residual(g: Any, x: Value, weight: Value) -> Value:
    """norm, something, sum; twice."""
    h = g.silu(g.rms_norm(x, weight, eps=1e-6, name="first"), name="mixed")
    x = g.add(x, h, name="middle")
    h = g.silu(g.rms_norm(x, weight, eps=1e-6, name="second"), name="fed")
    result: Value = g.add(h, x, name="out")
    return result


def model(*bodies: Graph, ends: bool = True) -> Graph:
    """Two calls of each body; outputs: every layer's, the norm of the last and the norm of its last position."""
    g = GraphBuilder("model")
    x = g.input("tokens", X)
    for number, region in enumerate((*bodies, *bodies)):
        x = g.call(region, x, prefix=f"layers.{number}.")
        g.output(f"hidden.{number}", x)
    if ends:
        weight = g.param("final", [4])
        g.output("normed", g.rms_norm(x, weight, eps=1e-6, name="final_norm"))
        g.output("last", g.rms_norm(g.take_last(x, name="taken"), weight, eps=1e-6, name="last_norm"))
    return g.build()


def run(graph: Graph) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 3, 4), np.float32)
    params = {name: rng.standard_normal(4).astype(np.float32) for name in sorted(graph.all_params())}
    return interpret(graph, {"tokens": x}, params.__getitem__, {}).outputs


def fused(graph: Graph) -> tuple[Graph, list[Event]]:
    ctx = Context()
    return BorderFusion().run(graph, ctx), ctx.events


def names(graph: Graph) -> list[str]:
    return [node.op.name for node in graph.nodes]


@pytest.mark.parametrize("within_first", [False, True])
def test_a_body_gets_a_delta_and_gives_one(within_first: bool) -> None:
    """Before and after the fusions within the layer; not one bit changes."""
    plain = model(body(residual))
    before = Fuse().run(plain, Context()) if within_first else plain
    after, events = fused(before)
    region = after.region("layer")
    assert [value.name for value in region.inputs] == ["x", "delta"]
    assert [(name, str(value)) for name, value in region.outputs] == [("x", "%middle"), ("delta", "%fed")]
    assert names(region)[0] == "add_rms_norm" and [v.name for v in region.nodes[0].outputs] == ["x.sum", "first"]
    assert names(Fuse().run(after, Context()).region("layer")) == ["add_rms_norm", "silu", "add_rms_norm", "silu"]
    assert [str(event) for event in events] == ["hit: border_fusion at layer of 'model': %out moves into the next layer's norm"]
    want, found = run(plain), run(after)
    assert list(found) == list(want)
    for name in want:
        np.testing.assert_array_equal(found[name], want[name], err_msg=name)


def test_sums_that_nobody_asks_for_are_dead() -> None:
    after, _ = fused(model(body(residual)))
    sums = {node.name: node for node in after.nodes if node.op.name == "add"}
    assert sorted(sums) == ["layers.0.out", "layers.1.out"]
    chosen = SelectOutputs(("last",)).run(after, Context())
    assert names(chosen) == ["zeros_like", "call", "call", "take_last", "take_last", "add_rms_norm"]
    chosen = SelectOutputs(("hidden.0", "normed")).run(after, Context())
    assert names(chosen) == ["zeros_like", "call", "add", "call", "add_rms_norm"]


def no_norm(g: Any, x: Value, weight: Value) -> Value:
    result: Value = g.add(x, g.mul(x, weight_like(g, x, weight)))
    return result


def weight_like(g: Any, x: Value, weight: Value) -> Value:
    result: Value = g.rms_norm(g.silu(x), weight, eps=1e-6)
    return result


def no_sum(g: Any, x: Value, weight: Value) -> Value:
    result: Value = g.silu(g.rms_norm(x, weight, eps=1e-6))
    return result


def not_residual(g: Any, x: Value, weight: Value) -> Value:
    h = g.rms_norm(x, weight, eps=1e-6)
    result: Value = g.add(h, g.silu(h))
    return result


def twice_residual(g: Any, x: Value, weight: Value) -> Value:
    result: Value = g.add(x, g.add(x, g.rms_norm(x, weight, eps=1e-6)))
    return result


def two_norms(g: Any, x: Value, weight: Value) -> Value:
    a, b = g.rms_norm(x, weight, eps=1e-6), g.rms_norm(x, weight, eps=1e-5)
    result: Value = g.add(x, g.mul(a, b))
    return result


def two_outputs(g: Any, x: Value, weight: Value) -> tuple[Value, ...]:
    h = g.rms_norm(x, weight, eps=1e-6)
    return g.add(x, h), h


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (no_norm, "0 of its nodes are an rms_norm of an input, expected one"),
        (no_sum, "its output %silu is made by silu, expected add"),
        (not_residual, "0 of the inputs of %add = add carry %x on, expected one"),
        (twice_residual, "2 of the inputs of %add_2 = add carry %x on, expected one"),
        (two_norms, "2 of its nodes are an rms_norm of an input, expected one"),
        (two_outputs, "it has 2 outputs, expected one"),
    ],
)
def test_a_body_of_another_shape_is_refused(inside: Body, message: str) -> None:
    assert find_border(body(inside)) == message


def test_an_output_that_is_a_state_too_is_refused() -> None:
    g = GraphBuilder("layer")
    x, weight = g.input("x", X), g.param("norm", [4])
    g.state("memory", X)
    y = residual(g, x, weight)
    g.update(memory=y)
    g.output("out", y)
    assert find_border(g.build()) == "its output %out is used inside too"


def test_a_body_that_gives_its_input_is_refused() -> None:
    assert find_border(body(lambda g, x, weight: x)) == "its output %x is made by nothing, expected add"


def test_bodies_that_are_left_alone_stand_among_those_that_are_not() -> None:
    plain = model(body(residual), body(no_sum, "other"))
    after, events = fused(plain)
    assert [(event.kind, event.node) for event in events] == [("hit", "layer"), ("refused", "other")]
    assert [value.name for value in after.region("other").inputs] == ["x"]
    assert names(after)[:8] == ["zeros_like", "call", "add", "call", "zeros_like", "call", "add", "call"]
    want, found = run(plain), run(after)
    for name in want:
        np.testing.assert_array_equal(found[name], want[name], err_msg=name)


def test_nothing_changes_without_a_body_or_without_fuel() -> None:
    alone = model(body(no_sum))
    assert fused(alone)[0] == alone
    plain, ctx = model(body(residual)), Context(fuel=Fuel(0))
    assert BorderFusion().run(plain, ctx) == plain and [event.kind for event in ctx.events] == ["out of fuel"]
