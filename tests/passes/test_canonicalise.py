"""Canonicalise: idle steps, chains, twins and nested splits; and what is close to them, but must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.types import DTYPES, bf16, f32, i32
from deltaloom.passes.canonicalise import LOSSLESS, Canonicalise
from deltaloom.passes.pipeline import Context

Build = Callable[[Any, Value], Value | tuple[Value, ...]]


def canonical(build: Build, type_: Any = f32[2, 3, 8]) -> list[str]:
    """The ops that are left; the meaning must be the same."""
    g = GraphBuilder("small")
    results = build(g, g.input("x", type_))
    for position, value in enumerate(results if isinstance(results, tuple) else (results,)):
        g.output(f"y{position}", value)
    graph = g.build()
    after = Canonicalise().run(graph, Context())
    assert Canonicalise().run(after, Context()) == after
    shape = type_.static_shape()
    x = np.random.default_rng(2).integers(-9, 9, shape) / (1 if type_.dtype == i32 else 8)
    want, found = (interpret(one, {"x": x.astype(type_.dtype.numpy)}, lambda name: None, {}).outputs for one in (graph, after))
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])
    return described(after)


def described(graph: Graph) -> list[str]:
    texts = []
    for node in graph.nodes:
        shown = {"reshape": "shape", "split": "sizes", "transpose": "axes", "cast": "dtype", "unflatten": "sizes"}
        key = shown.get(node.op.name)
        texts.append(f"{node.op.name} {node.op.attributes()[key]}" if key else node.op.name)
    return texts


IDLE: list[tuple[str, Build]] = [
    ("cast", lambda g, x: g.cast(x, dtype="float32")),
    ("reshape", lambda g, x: g.reshape(x, shape=(2, 3, 8))),
    ("flatten", lambda g, x: g.flatten(x, axes=1)),
    ("unflatten", lambda g, x: g.unflatten(x, sizes=(8,))),
    ("transpose", lambda g, x: g.transpose(x, axes=(0, 1, 2))),
    ("split", lambda g, x: g.split(x, sizes=(8,))),
    ("concat", lambda g, x: g.concat(x, axis=1)),
    ("there and back", lambda g, x: g.flatten(g.unflatten(x, sizes=(2, 4)))),
    ("back and there", lambda g, x: g.unflatten(g.flatten(x), sizes=(3, 8))),
    ("turned twice", lambda g, x: g.transpose(g.transpose(x, axes=(1, 2, 0)), axes=(2, 0, 1))),
    ("cut and joined", lambda g, x: g.concat(*g.split(x, sizes=(3, 5)), axis=2)),
    ("widened and narrowed", lambda g, x: g.cast(g.cast(x, dtype="float64"), dtype="float32")),
    ("reshaped back", lambda g, x: g.reshape(g.reshape(x, shape=(48,)), shape=(2, 3, 8))),
]


@pytest.mark.parametrize("build", [build for _, build in IDLE], ids=[name for name, _ in IDLE])
def test_what_changes_nothing_goes(build: Build) -> None:
    assert canonical(lambda g, x: g.silu(build(g, x))) == ["silu"]


CHAINS: list[tuple[list[str], Build]] = [
    (["reshape (6, 8)"], lambda g, x: g.reshape(g.reshape(x, shape=(48,)), shape=(6, 8))),
    (["reshape (48,)"], lambda g, x: g.reshape(g.flatten(x), shape=(48,))),
    (["reshape (48,)"], lambda g, x: g.reshape(g.unflatten(x, sizes=(2, 4)), shape=(48,))),
    (["transpose (2, 0, 1)"], lambda g, x: g.transpose(g.transpose(x, axes=(1, 2, 0)), axes=(1, 2, 0))),
    (["cast bfloat16"], lambda g, x: g.cast(g.cast(x, dtype="float64"), dtype="bfloat16")),
    (["flatten"], lambda g, x: g.flatten(g.unflatten(x, sizes=(2, 4)), axes=3)),
    (["silu", "silu"], lambda g, x: g.split(g.concat(g.silu(x), g.silu(g.silu(x)), axis=1), sizes=(3, 3), axis=1)),
]


@pytest.mark.parametrize(("want", "build"), CHAINS, ids=[want[0] for want, _ in CHAINS])
def test_a_chain_becomes_the_one_step_that_does_it(want: list[str], build: Build) -> None:
    assert canonical(build) == want


KEPT: list[tuple[list[str], Build]] = [
    (["cast bfloat16", "cast float32"], lambda g, x: g.cast(g.cast(x, dtype="bfloat16"), dtype="float32")),
    (["cast float16", "cast bfloat16"], lambda g, x: g.cast(g.cast(x, dtype="float16"), dtype="bfloat16")),
    (["flatten", "unflatten (8, 3)"], lambda g, x: g.unflatten(g.flatten(x), sizes=(8, 3))),
    (["unflatten (2, 2, 2)", "flatten"], lambda g, x: g.flatten(g.unflatten(x, sizes=(2, 2, 2)))),
    (["split (4, 4)", "concat"], lambda g, x: g.concat(*g.split(x, sizes=(4, 4))[::-1], axis=2)),
    (["split (4, 4)", "concat"], lambda g, x: g.concat(*g.split(x, sizes=(4, 4)), axis=1)),
    (["split (4, 4)", "concat"], lambda g, x: g.concat(*g.split(x, sizes=(4, 4))[:1] * 2, axis=2)),
]


@pytest.mark.parametrize(("want", "build"), KEPT, ids=[" ".join(want) for want, _ in KEPT])
def test_what_is_close_but_not_idle_stays(want: list[str], build: Build) -> None:
    assert canonical(build) == want


def test_casts_in_between_go_exactly_where_they_keep_every_value() -> None:
    for source, wider in LOSSLESS.items():
        for name in wider:
            low, high = DTYPES[source], DTYPES[name]
            kept = np.arange(-448, 449).astype(low.numpy) if low.kind == "int" else np.linspace(-400, 400, 999).astype(low.numpy)
            np.testing.assert_array_equal(kept.astype(high.numpy).astype(low.numpy), kept)
    assert canonical(lambda g, x: g.silu(g.cast(g.cast(x, dtype="float32"), dtype="bfloat16")), bf16[2, 3]) == ["silu"]
    assert canonical(lambda g, x: g.cast(g.cast(x, dtype="int64"), dtype="float32"), i32[4]) == ["cast float32"]
    assert canonical(lambda g, x: g.cast(g.cast(x, dtype="float32"), dtype="float64"), i32[4]) == ["cast float32", "cast float64"]


def test_a_split_of_a_part_is_one_split() -> None:
    def nested(g: Any, x: Value) -> tuple[Value, ...]:
        a, b = g.split(x, sizes=(2, 6), name="outer")
        c, d = g.split(b, sizes=(1, 5), axis=2, name="inner")
        e, f = g.split(d, sizes=(2, 3), name="innermost")
        return a, c, e, f

    assert canonical(nested) == ["split (2, 1, 2, 3)"]
    g = GraphBuilder("named")
    for position, value in enumerate(nested(g, g.input("x", f32[2, 3, 8]))):
        g.output(str(position), value)
    (node,) = Canonicalise().run(g.build(), Context()).nodes
    assert [value.name for value in node.outputs] == ["outer.0", "inner.0", "innermost.0", "innermost.1"]
    assert {"outer.0", "inner.0"} <= set(node.origins)


def test_a_split_stays_where_its_part_is_read_as_a_whole() -> None:
    def shared(g: Any, x: Value) -> tuple[Value, ...]:
        a, b = g.split(x, sizes=(2, 6))
        return a, *g.split(b, sizes=(1, 5)), g.silu(b)

    def returned(g: Any, x: Value) -> tuple[Value, ...]:
        a, b = g.split(x, sizes=(2, 6))
        return a, b, *g.split(b, sizes=(1, 5))

    def across(g: Any, x: Value) -> tuple[Value, ...]:
        a, b = g.split(x, sizes=(2, 6))
        return a, *g.split(b, sizes=(1, 2), axis=1)

    assert canonical(shared) == ["split (2, 6)", "split (1, 5)", "silu"]
    assert canonical(returned) == ["split (2, 6)", "split (1, 5)"]
    assert canonical(across) == ["split (2, 6)", "split (1, 2)"]


def test_equal_computations_are_made_once_even_when_their_chains_differ() -> None:
    def twins(g: Any, x: Value) -> Value:
        a = g.silu(g.reshape(x, shape=(48,)))
        b = g.silu(g.reshape(g.reshape(x, shape=(6, 8)), shape=(48,)))
        result: Value = g.add(a, b)
        return result

    assert canonical(twins) == ["reshape (48,)", "silu", "add"]


def test_stateful_nodes_are_never_merged() -> None:
    g = GraphBuilder("stateful")
    x, weight = g.input("x", f32[2, 3, 4]), g.param("w", [4, 1, 2])
    states = [g.state(name, f32[2, 4, 1]) for name in ("a", "b")]
    first, second = (g.causal_conv1d(x, weight, states[0]) for _ in states)
    g.update(a=first[1], b=second[1])
    g.output("y", g.add(first[0], second[0]))
    assert described(Canonicalise().run(g.build(), Context())) == ["causal_conv1d", "causal_conv1d", "add"]
