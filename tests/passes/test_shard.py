"""Propagation and partition on small graphs: what is divided, which collectives come of it, what is refused."""

import numpy as np
import pytest

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError, ConfigError, DeltaloomError, GraphError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import QuantType, f8_e4m3, f32, f64, i64
from deltaloom.ops.linear import Linear
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.passes.shard.partition import Shard
from deltaloom.passes.shard.plan import Divide, Plan
from deltaloom.runtime.lockstep import LockStep, bind_rank
from deltaloom.runtime.weights import materialise

BATCH = symbol("batch")


class Stored:
    """Random tensors by name."""

    def __init__(self, graph: Graph) -> None:
        generator = np.random.default_rng(0)
        self.arrays = {n: generator.normal(size=t.static_shape()) for n, t in graph.all_params().items()}

    def read(self, name: str) -> Array:
        return self.arrays[name]


def sharded(graph: Graph, plan: Plan, **mesh: int) -> Graph:
    return run_pipeline(graph, [Canonicalise(), Shard(tuple(mesh.items()), plan), PackSiblings(), LiftWeights()], Context()).graph


def agrees(graph: Graph, plan: Plan, inputs: dict[str, Array], **mesh: int) -> list[str]:
    """Whether the ranks of a mesh compute what one does; the names of the ops that they run."""
    divided, stored = sharded(graph, plan, **mesh), Stored(graph)
    wanted = interpret(graph, inputs, stored.read, {}).outputs
    found = LockStep(divided, mesh, stored).run(inputs, [{}] * int(np.prod(list(mesh.values())))).outputs
    for name, truth in wanted.items():
        np.testing.assert_allclose(found[name], truth, atol=1e-12, err_msg=name)
    return [node.op.name for node in divided.nodes]


def mlp(*, bias: bool = False) -> Graph:
    g = GraphBuilder("mlp", dtype=f64)
    x = g.input("x", f64[BATCH, 6])
    inner = g.silu(g.linear(x, g.param("up", [8, 6]), name="inner"))
    offset = [g.param("bias", [6])] if bias else []
    g.output("y", g.linear(inner, g.param("down", [6, 8]), *offset, name="y"))
    return g.build()


X = {"x": np.random.default_rng(1).normal(size=(3, 6))}


def test_one_line_divides_a_feed_forward_block() -> None:
    for ranks in (2, 4, 8):
        names = agrees(mlp(), (Divide("down", "i"),), X, tp=ranks)
        assert names == ["linear", "silu", "linear", "all_reduce"]


def test_a_bias_is_added_once() -> None:
    assert agrees(mlp(bias=True), (Divide("down", "i"),), X, tp=2) == ["linear", "silu", "linear", "all_reduce"]


def test_two_axes_of_a_mesh() -> None:
    both = (Divide("down", "i", "tp"), Divide("down", "i", "ep"))
    names = agrees(mlp(bias=True), both, X, tp=2, ep=2)
    assert names == ["linear", "silu", "linear", "all_reduce", "all_reduce"]
    names = agrees(mlp(), (Divide("down", "i", "tp"), Divide("down", "o", "ep")), X, tp=2, ep=3)
    assert sorted(names) == ["all_gather", "all_reduce", "linear", "linear", "silu"]


def chain(*, stop: bool = False) -> Graph:
    """Two linears, of which the first may be divided by its rows and the second by its columns."""
    g = GraphBuilder("chain", dtype=f64)
    x = g.input("x", f64[BATCH, 6])
    h = g.linear(x, g.param("first", [4, 6]), name="h")
    h = g.l2_norm(h, name="norm") if stop else h
    g.output("y", g.linear(h, g.param("second", [8, 4]), name="y"))
    return g.build()


def test_what_must_be_whole_is_gathered() -> None:
    assert agrees(chain(stop=True), (Divide("first", "o"),), X, tp=2) == ["linear", "all_gather", "l2_norm", "linear"]


def test_what_is_computed_whole_is_cut_without_an_exchange() -> None:
    names = agrees(chain(stop=True), (Divide("second", "i"),), X, tp=2)
    assert names == ["linear", "l2_norm", "shard", "linear", "all_reduce"]


def test_a_partial_sum_that_is_divided_next_is_scattered() -> None:
    g = GraphBuilder("two", dtype=f64)
    h = g.linear(g.input("x", f64[BATCH, 6]), g.param("a", [4, 6]), name="h")
    g.output("y", g.linear(h, g.param("b", [6, 4]), name="y"))
    names = agrees(g.build(), (Divide("a", "i"), Divide("b", "i")), X, tp=2)
    assert names == ["shard", "linear", "reduce_scatter", "linear", "all_reduce"]


def test_another_axis_of_the_same_value_is_turned() -> None:
    g = GraphBuilder("turn", dtype=f64)
    x = g.input("x", f64[BATCH, 6])
    rows = g.unflatten(g.linear(x, g.param("a", [8, 6]), name="h"), sizes=(2, 4), name="rows")
    g.output("y", g.linear(rows, g.param("b", [3, 4]), name="y"))
    assert agrees(g.build(), (Divide("a", "o"),), X, tp=2) == ["linear", "unflatten", "linear", "all_gather"]
    names = agrees(g.build(), (Divide("a", "o"), Divide("b", "i")), X, tp=2)
    assert names == ["linear", "unflatten", "all_to_all", "linear", "all_reduce"]


def test_partial_sums_are_added_before_they_are_reduced() -> None:
    g = GraphBuilder("sum", dtype=f64)
    x = g.input("x", f64[BATCH, 6])
    one = g.linear(g.silu(g.linear(x, g.param("a", [4, 6]))), g.param("a_down", [6, 4]), name="one")
    two = g.linear(g.silu(g.linear(x, g.param("b", [4, 6]))), g.param("b_down", [6, 4]), name="two")
    g.output("y", g.add(g.add(one, two, name="both"), x, name="y"))
    names = agrees(g.build(), (Divide("*_down", "i"),), X, tp=2)
    assert names.count("all_reduce") == 1 and names.index("all_reduce") == len(names) - 2


def test_pieces_of_a_gathered_axis_come_back_in_order() -> None:
    """[q | k] of which both are divided: no rank has neighbouring columns, and the output has them again."""
    g = GraphBuilder("pieces", dtype=f64)
    x = g.input("x", f64[BATCH, 6])
    both = g.linear(x, g.param("w", [12, 6]), name="both")
    q, k = g.split(both, sizes=(4, 8), axis=-1, name="q_k")
    g.output("both", both)
    g.output("q", g.linear(q, g.param("q_down", [6, 4]), name="q_out"))
    g.output("k", g.linear(k, g.param("k_down", [6, 8]), name="k_out"))
    divided = sharded(g.build(), (Divide("*_down", "i"),), tp=2)
    assert "{tp: 1 (4/2|8/2)}" in print_graph(divided)
    agrees(g.build(), (Divide("*_down", "i"),), X, tp=2)
    agrees(g.build(), (Divide("*_down", "i"),), X, tp=4)


def test_shardings_survive_text_and_json() -> None:
    divided = run_pipeline(mlp(bias=True), [Canonicalise(), Shard((("tp", 2),), (Divide("down", "i"),))], Context()).graph
    text = print_graph(divided)
    assert "%inner: f64[batch, 4]{tp: 1} = linear(" in text and "%y: f64[batch, 6]{tp: partial} = linear(" in text
    assert print_graph(parse_graph(text)) == text
    assert print_graph(from_json(to_json(divided))) == text


def test_a_rank_reads_its_own_rows_only() -> None:
    """The weight of one rank is a view of the stored tensor."""
    graph = mlp()
    divided, stored = sharded(graph, (Divide("down", "i"),), tp=2), Stored(graph)
    assert divided.weights is not None
    name = next(name for name, value in divided.weights.outputs if "up" in name)
    for rank in range(2):
        weights = bind_rank(divided.weights, {"tp": rank})
        array = materialise(weights, weights.output(name), "", stored, ())
        assert isinstance(array, np.ndarray) and np.shares_memory(array, stored.arrays["up"])
        np.testing.assert_array_equal(array, stored.arrays["up"][4 * rank : 4 * rank + 4])


def test_quantised_weights_are_cut_before_they_are_dequantised() -> None:
    g = GraphBuilder("fp8", dtype=f64)
    form = QuantType(f8_e4m3, (4, 4), f32)
    x = g.input("x", f64[BATCH, 8])
    h = g.linear(x, g.dequantize(g.param("up", [16, 8], form), dtype="float64"), name="h")
    g.output("y", g.linear(h, g.dequantize(g.param("down", [8, 16], form), dtype="float64"), name="y"))
    graph, generator = g.build(), np.random.default_rng(0)

    class Codes:
        tensors = {
            "up": generator.normal(size=(16, 8)).astype(f8_e4m3.numpy),
            "up_scale_inv": generator.random((4, 2)).astype(np.float32),
            "down": generator.normal(size=(8, 16)).astype(f8_e4m3.numpy),
            "down_scale_inv": generator.random((2, 4)).astype(np.float32),
        }

        def read(self, name: str) -> Array:
            return self.tensors[name]

        def param(self, name: str) -> QuantizedArray:
            return QuantizedArray(self.read(name), self.read(name + "_scale_inv"), form, self.read(name).shape)

    inputs = {"x": generator.normal(size=(2, 8))}
    wanted = interpret(graph, inputs, Codes().param, {}).outputs["y"]
    plan = (Divide("down", "i"),)
    found = LockStep(sharded(graph, plan, tp=4), {"tp": 4}, Codes()).run(inputs, [{}] * 4).outputs["y"]
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    with pytest.raises(GraphError, match="inside a block of its scales"):
        sharded(graph, plan, tp=8)


@pytest.mark.parametrize(
    ("plan", "mesh", "error", "reason"),
    [
        ((Divide("down", "i"),), {"tp": 3}, CompileError, r"factor i of %y = linear in 'mlp' has size 8, which 3 ranks of 'tp'"),
        ((Divide("down", "i"),), {"pp": 2}, CompileError, "divides nothing over the mesh axis 'pp'; it divides over tp"),
        ((), {"tp": 2}, CompileError, "divides nothing over the mesh axis 'tp'; it is empty"),
        ((Divide("down", "i"),), {"cp": 2}, ConfigError, "mesh has an axis 'cp'; known are tp, ep, pp, dp"),
        ((Divide("down", "i"),), {"tp": 0}, ConfigError, "mesh axis tp has 0 ranks, expected a whole number"),
    ],
)
def test_refusals(plan: Plan, mesh: dict[str, int], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        sharded(mlp(), plan, **mesh)


def test_where_the_size_allows_it() -> None:
    assert agrees(mlp(), (Divide("down", "i", needed=False),), X, tp=3) == ["linear", "silu", "linear"]


def test_a_string_that_contradicts_its_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, reason in (
        ("+... i, o j, +o -> ... o", "no op that reads it has such a factor"),
        ("+... j, o i, +o -> ... o", "'in' is 4, but 8 in x"),
        ("+... i, o i, +o -> ... i", "but its sharding string"),
    ):
        monkeypatch.setattr(Linear, "sharding", wrong)
        with pytest.raises(DeltaloomError, match=reason):
            sharded(mlp(), (Divide("down", "i"),), tp=2)


def test_a_layer_is_divided_before_it_is_packed() -> None:
    graph = run_pipeline(mlp(), [Canonicalise(), PackSiblings()], Context()).graph
    with pytest.raises(CompileError, match="cannot work on a graph that is 'packed' already"):
        run_pipeline(graph, [Shard((("tp", 2),), (Divide("down", "i"),))], Context(), properties=frozenset({"canonical", "packed"}))


def test_an_input_that_is_missing() -> None:
    divided = sharded(mlp(), (Divide("down", "i"),), tp=2)
    with pytest.raises(GraphError, match="needs the input 'x', which was not given"):
        LockStep(divided, {"tp": 2}, Stored(mlp())).run({"ids": np.zeros((1, 1), i64.numpy)}, [{}, {}])
