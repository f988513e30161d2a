"""Random graphs with everything that is needed to evaluate them, for tests of passes; and strategies of Hypothesis for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.interpret import Results, interpret, type_of
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.op import Array, Draw, Op
from deltaloom.graph.types import DType, TensorType, bf16, f16, f32, f64, i64
from deltaloom.testing.draw import SIZES, CaseDraw
from deltaloom.testing.evaluate import concrete, draw_case, in_float64, one_node
from deltaloom.testing.toy_models import HYBRID, toy_graph

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past", low=0)
KINDS = ("add", "mul", "silu", "twins", "pieces", "chain", "siblings", "mlp", "norm", "joined", "lifted", "fixed", "append")


@dataclass(frozen=True)
class Sample:
    """A graph and arrays for its inputs, checkpoint parameters and states, by full name."""

    graph: Graph
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    states: Mapping[str, Any]

    def evaluate(self, graph: Graph | None = None) -> Results:
        """Outputs and new states of ``graph`` (the sample's own if None) by the interpreter. A graph whose weights were lifted gets
        them from its weight graphs."""
        given = self.graph if graph is None else graph
        params = dict(self.params)
        for one in given.instances():
            if one.graph.weights is not None:
                made = interpret(one.graph.weights, {}, lambda name, prefix=one.prefix: self.params[prefix + name], {}).outputs  # type: ignore[misc]
                params.update({one.prefix + name: array for name, array in made.items()})
        inputs = {value.name: self.inputs[value.name] for value in given.inputs}
        return interpret(given, inputs, params.__getitem__, self.states)


def random_sample(draw: Draw, *, ops: Sequence[type[Op]] = (), seq: int | None = None) -> Sample:
    """One of: a random graph, the small hybrid model, or a case of one of ``ops``. ``seq``: its number of tokens (None: any)."""
    kind = draw.choice("random", "random", "model", *(["op", "op"] if ops else []))
    if kind == "op":
        return op_sample(draw.choice(*ops), draw)
    graph = random_graph(draw) if kind == "random" else toy_graph(HYBRID, f64)
    return filled(graph, draw, {"batch": draw.integer(1, 2), "seq": seq or draw.integer(1, 4), "past": draw.choice(0, 2)})


def op_sample(op: type[Op], draw: Draw) -> Sample:
    """A case of ``op`` as a graph of one node."""
    case = draw_case(op, draw)
    arrays = in_float64(concrete(case, f64))
    graph = one_node(case.op, tuple(map(type_of, arrays)))
    return Sample(graph, {value.name: array for value, array in zip(graph.inputs, arrays, strict=True)}, {}, {})


def filled(graph: Graph, draw: Draw, sizes: Mapping[str, int]) -> Sample:
    """A sample of ``graph`` with random arrays: its symbols have these ``sizes``, no position is padding, integers are small."""

    def array(type_: TensorType, scale: float = 1.0) -> Array:
        shape, dtype = type_.substitute(sizes).static_shape(), type_.plain_dtype
        if dtype.kind == "bool":
            return np.ones(shape, bool)
        numbers = draw.integers(0, 5, *shape) if dtype.kind == "int" else draw.uniform(-1.0, 1.0, *shape) * scale
        return numbers.astype(dtype.numpy)

    return Sample(
        graph,
        {value.name: array(value.type) for value in graph.inputs},
        {name: array(type_, 0.5) for name, type_ in graph.all_params().items()},
        {name: array(state.value.type) for name, state in graph.all_states().items()},
    )


def random_graph(draw: Draw, dtype: DType = f64) -> Graph:
    """A legal graph over ``[batch, seq, hidden]`` with up to two regions, each called at least once, and states of both kinds."""
    hidden = draw.choice(4, 6)
    regions = [_body(draw, f"region{number}", [], hidden, dtype) for number in range(draw.integer(0, 2))]
    return _body(draw, "random", regions, hidden, dtype)


def _body(draw: Draw, name: str, regions: list[Graph], hidden: int, dtype: DType) -> Graph:
    g = GraphBuilder(name, dtype=dtype)
    x = g.input("x", dtype[BATCH, SEQ, hidden])
    values = [x]
    if draw.choice(False, True):
        g.input("ids", i64[BATCH, SEQ])
    for number in range(draw.integer(1, 6)):
        x, y = draw.choice(*values), draw.choice(*values)
        with g.scope(draw.choice("mixer", "mixer.gate", "feed_forward")):
            values.append(_step(g, draw.choice(*KINDS), number, x, y))
    for number, region in enumerate([*regions, *([draw.choice(*regions)] if regions else [])]):
        inputs = [draw.choice(*values) if value.name == "x" else _ids(g) for value in region.inputs]
        made = g.call(region, *inputs, prefix=f"layers.{number}.")
        values.append(made[0] if isinstance(made, tuple) else made)
    g.output("out", values[-1])
    if draw.choice(False, True):
        g.output("other", draw.choice(*values))
    return g.build()


def _step(g: GraphBuilder, kind: str, number: int, x: Value, y: Value) -> Value:
    """One more value of the type of ``x``, by some nodes."""
    hidden = x.type.shape[-1]
    assert isinstance(hidden, int)

    def weight(name: str, rows: int = hidden, columns: int = hidden) -> Value:
        return g.param(f"{name}{number}.weight", [rows, columns])

    if kind in ("add", "mul"):
        return getattr(g, kind)(x, y)  # type: ignore[no-any-return]
    if kind == "twins":
        return g.add(g.silu(x), g.silu(x))  # type: ignore[no-any-return]
    if kind == "pieces":
        left, right = g.split(x, sizes=(1, hidden - 1))
        return g.concat(right, left, axis=2)  # type: ignore[no-any-return]
    if kind == "chain":
        heads = g.unflatten(x, sizes=(2, hidden // 2))
        return g.flatten(heads, axes=2)  # type: ignore[no-any-return]
    if kind == "siblings":
        return g.mul(g.linear(x, weight("left")), g.linear(x, weight("right")))  # type: ignore[no-any-return]
    if kind == "mlp":
        gate, up = g.linear(x, weight("gate", 2 * hidden)), g.linear(x, weight("up", 2 * hidden))
        return g.linear(g.swiglu(gate, up), weight("down", hidden, 2 * hidden))  # type: ignore[no-any-return]
    if kind == "norm":
        return g.rms_norm(g.add(x, y), g.param("norm.weight", [hidden]), eps=1e-6)  # type: ignore[no-any-return]
    if kind == "joined":
        both = g.concat(weight("one"), weight("two"), axis=0)
        left, right = g.split(g.linear(x, both), sizes=(hidden, hidden))
        return g.add(left, right)  # type: ignore[no-any-return]
    if kind == "lifted":
        scale = g.one_plus(g.param("lifted.weight", [hidden]))
        return g.rms_norm(x, scale, eps=1e-6, zero_centred=True)  # type: ignore[no-any-return]
    if kind == "fixed":
        state = g.state(f"fixed{number}", g.dtype[BATCH, hidden])
        g.update(**{f"fixed{number}": g.silu(state)})
        return g.silu(x)  # type: ignore[no-any-return]
    if kind == "append":
        state = g.state(f"append{number}", g.dtype[BATCH, PAST, hidden], append_axis=1)
        g.update(**{f"append{number}": g.concat(state, x, axis=1)})
        return g.add(x, y)  # type: ignore[no-any-return]
    return g.silu(x)  # type: ignore[no-any-return]


def _ids(g: GraphBuilder) -> Value:
    """The input ``ids``, declared if it is not there."""
    for value in g.build().inputs:
        if value.name == "ids":
            return value
    return g.input("ids", i64[BATCH, SEQ])


def shapes(*, rank: tuple[int, int] = (1, 4), largest: int = 17) -> st.SearchStrategy[tuple[int, ...]]:
    """Strategy: shapes of ``rank`` axes (least and most), with a taste for 1, primes and the numbers around 16 and 64."""
    sizes = st.sampled_from([size for size in SIZES if size <= largest])
    return st.lists(sizes, min_size=rank[0], max_size=rank[1]).map(tuple)


def dtypes(*chosen: DType) -> st.SearchStrategy[DType]:
    """Strategy: one of ``chosen``, or of all float dtypes that models compute in."""
    return st.sampled_from(chosen or (f32, f64, bf16, f16))


def graphs(dtype: DType = f64) -> st.SearchStrategy[Graph]:
    """Strategy: legal graphs that compute in ``dtype``, with regions and states (``random_graph``)."""
    return st.composite(lambda draw: random_graph(CaseDraw(_Drawing(draw)), dtype))()


class _Drawing:
    """The ``draw`` of a composite strategy as a ``CaseDraw`` wants it."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def draw(self, strategy: st.SearchStrategy[Any], label: Any = None) -> Any:
        return self._draw(strategy)
