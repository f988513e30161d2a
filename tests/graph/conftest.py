"""Random legal graphs, and one written by hand that has a bit of everything."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import strategies as st

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.interpret import Results, interpret
from deltaloom.graph.ir import Graph, Node, Placement, Refusal
from deltaloom.graph.op import Op
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.registry import OpRegistry
from deltaloom.graph.types import TensorType, f32, i64
from deltaloom.ops import TABLE

BATCH, SEQ, PAST = symbol("batch"), symbol("seq", 1, 64), symbol("past", 0)
SIZES = {"batch": 2, "seq": 3, "past": 1}
HIDDEN = 4


class Tagged(Op):
    """x, with an attribute of every kind."""

    name: ClassVar[str] = "tests.tagged"
    version: ClassVar[int] = 3
    number: int
    scale: float = 1.0
    flag: bool = False
    label: str = ""
    maybe: str | None = None
    table: tuple[float, ...] = ()
    nested: tuple[tuple[int, str], ...] = ()

    def infer(self, x: TensorType) -> TensorType:
        return x

    def reference(self, x: np.ndarray) -> np.ndarray:
        return x


REGISTRY = OpRegistry()
REGISTRY.add_table(TABLE)
REGISTRY.add(Tagged)

TEXT = """\
graph sample (format 1)
symbols batch >= 1, past >= 0, 1 <= seq <= 64
inputs
  %ids: i64[batch, seq]
params
  @embed.weight: f32[7, 4]
  @norm.weight: f32[4]
nodes
  %embed: f32[batch, seq, 4] = embedding(%ids, @embed.weight)  # model at models/sample.py:10
  %layers.0.out: f32[batch, seq, 4] = call(%embed) {region='layer', prefix='layers.0.'}  # at models/sample.py:12
  %layers.1.out: f32[batch, seq, 4] = call(%layers.0.out) {region='layer', prefix='layers.1.'}  # at models/sample.py:12
  %norm: f32[batch, seq, 4] = rms_norm(%layers.1.out, @norm.weight) {eps=1e-06, zero_centred=False}  # from first, second
outputs
  hidden = %norm
region layer
  inputs
    %x: f32[batch, seq, 4]
  params
    @proj.weight: f32[8, 4]
  states
    $total: f32[batch, 4]
    $seen: f32[batch, past, 4] append axis 1
  nodes
    %wide: f32[batch, seq, 8] = linear(%x, @proj.weight)  # mixer at models/sample.py:20
    %gate: f32[batch, seq, 4], %up: f32[batch, seq, 4] = split(%wide) {sizes=(4, 4), axis=-1}  # mixer
    %act: f32[batch, seq, 4] = swiglu(%gate, %up) on numpy swiglu, not torch.swiglu: "no \\"torch\\" here"  # mixer
    %seen_now: f32[batch, past + seq, 4] = concat($seen, %act) {axis=1}
    %twice: f32[batch, 4] = add($total, $total)
    %out: f32[batch, seq, 4] = add(%x, %act)
  outputs
    out = %out
  updates
    total = %twice
    seen = %seen_now
"""


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT


@pytest.fixture(scope="session")
def registry() -> OpRegistry:
    return REGISTRY


@pytest.fixture(scope="session")
def sample() -> Graph:
    return parse_graph(TEXT, registry=REGISTRY)


@st.composite
def attributes(draw: st.DrawFn) -> Tagged:
    number = st.floats(allow_nan=False)
    return Tagged(
        number=draw(st.integers()),
        scale=draw(number),
        flag=draw(st.booleans()),
        label=draw(st.text(max_size=5)),
        maybe=draw(st.none() | st.text(max_size=3)),
        table=tuple(draw(st.lists(number, max_size=3))),
        nested=tuple(draw(st.lists(st.tuples(st.integers(), st.text(max_size=2)), max_size=2))),
    )


def body(draw: st.DrawFn, name: str, regions: list[Graph]) -> Graph:
    """A builder run of random steps; with ``regions`` it is a top level that calls each at least once."""
    g = GraphBuilder(name, registry=REGISTRY)
    plain = f32[BATCH, SEQ, HIDDEN]
    values = [g.input("x", plain)]
    if draw(st.booleans()):
        g.input("ids", i64[BATCH, SEQ])
    calls = [*regions, *(draw(st.lists(st.sampled_from(regions), max_size=2)) if regions else [])]
    for step in range(draw(st.integers(1, 7))):
        x, y = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["add", "mul", "silu", "tagged", "pieces", "linear", "norm", "fixed", "append"]))
        with g.scope(draw(st.sampled_from(["", "mixer", "mixer.gate"])) or "top"):
            if kind in ("add", "mul"):
                values.append(g.apply(REGISTRY.get(kind)(), x, y))
            elif kind == "silu":
                values.append(g.silu(x))
            elif kind == "tagged":
                values.append(g.apply(draw(attributes()), x))
            elif kind == "pieces":
                left, right = g.split(x, sizes=(1, HIDDEN - 1))
                values.append(g.concat(right, left, axis=2))
            elif kind == "linear":
                values.append(g.linear(x, g.param(f"proj{step}.weight", [HIDDEN, HIDDEN])))
            elif kind == "norm":
                values.append(g.rms_norm(x, g.param("norm.weight", [HIDDEN]), eps=1e-6))
            elif kind == "fixed":
                state = g.state(f"fixed{step}", f32[BATCH, 2])
                g.update(**{f"fixed{step}": g.silu(state)})
            else:
                state = g.state(f"append{step}", f32[BATCH, PAST, HIDDEN], append_axis=1)
                g.update(**{f"append{step}": g.concat(state, x, axis=1)})
    for number, region in enumerate(calls):
        inputs = [draw(st.sampled_from(values)) if v.name == "x" else _ids(g) for v in region.inputs]
        values.append(g.call(region, *inputs, prefix=f"layers.{number}."))
    g.output("out", draw(st.sampled_from(values)))
    graph = g.build()
    return replace(graph, nodes=tuple(_told(draw, node) for node in graph.nodes))


def _ids(g: GraphBuilder) -> Any:
    known = [value for value in g._inputs if value.name == "ids"]
    return known[0] if known else g.input("ids", i64[BATCH, SEQ])


def _told(draw: st.DrawFn, node: Node) -> Node:
    """Now and then a strange scope, source, origins and placement."""
    if draw(st.integers(0, 4)):
        return node
    words = st.text(min_size=1, max_size=6) | st.sampled_from(["at", "from", "on", "not", "at:5", "a.b", "x y", "#", ""])
    placement = Placement(
        draw(words),
        draw(words),
        tuple(Refusal(draw(words), draw(st.text(max_size=9))) for _ in range(draw(st.integers(0, 2)))),
        tuple((i, (1, 0)) for i in range(draw(st.integers(0, 2)))),
    )
    origins = tuple(draw(st.lists(words, max_size=2)))
    scope = node.scope if draw(st.booleans()) else draw(words)
    return replace(node, scope=scope, source=draw(words), origins=origins, placement=draw(st.none() | st.just(placement)))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    regions = [body(draw, f"region{number}", []) for number in range(draw(st.integers(0, 2)))]
    return body(draw, "random", regions)


@pytest.fixture(scope="session")
def random_graphs() -> st.SearchStrategy[Graph]:
    return graphs()


def array(name: str, type_: TensorType) -> np.ndarray:
    """Numbers that depend on the name and the type only."""
    shape = type_.substitute(SIZES).static_shape()
    numbers = np.random.default_rng(sum(name.encode())).normal(size=shape)
    return (np.abs(numbers * 3) if type_.plain_dtype.kind == "int" else numbers).astype(type_.plain_dtype.numpy)


def evaluate(graph: Graph) -> Results:
    """Outputs and new states of ``graph`` for inputs made from the names."""
    params = graph.all_params()
    return interpret(
        graph,
        {value.name: array(value.name, value.type) for value in graph.inputs},
        lambda name: array(name, params[name]),
        {name: array(name, state.value.type) for name, state in graph.all_states().items()},
    )


@pytest.fixture(scope="session")
def run() -> Any:
    return evaluate
