"""Each pass on small graphs: what it changes, what it refuses, and that the meaning stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import Toy, by_reference, toy_context

from deltaloom.backends import backend
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import bool_, f32, i64
from deltaloom.passes.assign import Assign
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.config import CompileConfig, compile_config
from deltaloom.passes.driver import SHARED, Driver, Variant
from deltaloom.passes.emit import emit
from deltaloom.passes.kernel import Kernel, size
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.passes.pipeline import Context, Pass, run_pipeline
from deltaloom.passes.prepack import decide_layouts
from deltaloom.passes.segment import Transfers
from deltaloom.passes.specialise import AssumeUnpadded, SelectOutputs, Specialise

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past", low=0)
RNG = np.random.default_rng(5)


def mlp(width: int = 6) -> Graph:
    """Two packed projections, an activation and a head, with everything canonicalise and lift can bite on."""
    g = GraphBuilder("mlp")
    x = g.input("x", f32[BATCH, SEQ, 4])
    with g.scope("mlp"):
        packed = g.concat(g.param("gate.weight", [width, 4]), g.param("up.weight", [width, 4]), axis=0, name="packed")
        gate, up = g.split(g.linear(x, packed), sizes=(width, width), axis=-1)
        h = g.swiglu(g.cast(gate, dtype="float32"), up)
        twin = g.swiglu(gate, up)
        y = g.linear(g.add(h, twin), g.param("down.weight", [4, width]))
    g.silu(y, name="dead")
    g.output("y", y)
    return g.build()


def weights_of(graph: Graph) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(type_.static_shape(), np.float32) for name, type_ in graph.all_params().items()}


def meaning(graph: Graph, x: Any, params: dict[str, Any]) -> Any:
    """The output of a graph without states; lifted parameters come from its weight graph."""
    if graph.weights is not None:
        made = interpret(graph.weights, {}, params.__getitem__, {}).outputs
        params = {**params, **made}
    return interpret(graph, {"x": x}, params.__getitem__, {}).outputs["y"]


def test_canonicalise_merges_twins_and_drops_casts_and_dead_code() -> None:
    graph = mlp()
    after = Canonicalise().run(graph, Context())
    assert [n.op.name for n in after.nodes] == ["concat", "linear", "split", "swiglu", "add", "linear"]
    x, params = RNG.standard_normal((2, 3, 4), np.float32), weights_of(graph)
    np.testing.assert_array_equal(meaning(after, x, params), meaning(graph, x, params))


def test_lifting_leaves_no_weight_arithmetic_and_keeps_the_meaning() -> None:
    graph = mlp()
    done = run_pipeline(graph, SHARED, Context()).graph
    assert "concat" not in [n.op.name for n in done.nodes]
    assert done.weights is not None and [n.op.name for n in done.weights.nodes] == ["concat"]
    assert [p.name for p in done.params] == [name for name, _ in done.weights.outputs] == ["mlp.packed", "mlp.down.weight"]
    assert done.all_params() == graph.all_params()
    x, params = RNG.standard_normal((1, 2, 4), np.float32), weights_of(graph)
    np.testing.assert_array_equal(meaning(done, x, params), meaning(graph, x, params))


def test_siblings_become_one_linear_and_a_split() -> None:
    g = GraphBuilder("siblings")
    x = g.input("x", f32[BATCH, SEQ, 4])
    with g.scope("attn"):
        q, k = (g.linear(x, g.param(f"{n}.weight", [size, 4]), name=n) for n, size in (("q", 6), ("k", 2)))
        with_bias = g.linear(x, g.param("v.weight", [6, 4]), g.param("v.bias", [6]))
    computed = g.linear(x, g.input("w", f32[6, 4]))
    g.output("y", g.add(g.add(g.mul(q, with_bias), computed), g.concat(k, k, k, axis=-1)))
    graph = g.build()
    after = PackSiblings().run(graph, Context())
    packed = next(n for n in after.nodes if n.op.name == "linear")
    assert packed.name == "attn.q_k" and packed.origins == ("attn.q", "attn.k")
    assert str(packed.outputs[0].type) == "f32[batch, seq, 8]"
    assert [n.op.name for n in after.nodes].count("linear") == 3 and [n.op.name for n in after.nodes].count("split") == 1
    inputs = {"x": RNG.standard_normal((2, 3, 4), np.float32), "w": RNG.standard_normal((6, 4), np.float32)}
    params = weights_of(graph)
    want, found = (interpret(one, inputs, params.__getitem__, {}).outputs["y"] for one in (graph, after))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_unused_weights_leave_the_weight_graph_with_their_output() -> None:
    g = GraphBuilder("two")
    x = g.input("x", f32[BATCH, 4])
    g.output("a", g.linear(x, g.one_plus(g.param("a.weight", [3, 4]))))
    g.output("b", g.linear(x, g.param("b.weight", [3, 4])))
    lifted = run_pipeline(g.build(), (Canonicalise(), LiftWeights()), Context()).graph
    assert set(SelectOutputs(("b",)).run(lifted, Context()).all_params()) == {"b.weight"}


def padded() -> Graph:
    g = GraphBuilder("padded")
    x = g.input("x", f32[BATCH, SEQ, 4])
    valid = g.input("valid", bool_[BATCH, PAST + SEQ])
    g.output("y", g.silu(g.mask_padding(x, valid)))
    return g.build()


def test_assume_unpadded_removes_the_mask_and_its_input() -> None:
    after = AssumeUnpadded().run(padded(), Context())
    assert [v.name for v in after.inputs] == ["x"] and [n.op.name for n in after.nodes] == ["silu"]


def test_specialise_fixes_the_sequence_length_in_every_type() -> None:
    after = Specialise(1).run(padded(), Context())
    assert str(after.inputs[0].type) == "f32[batch, 1, 4]" and str(after.inputs[1].type) == "bool[batch, past + 1]"


def lifted_mlp(width: int = 6) -> Any:
    """Without fusions, so that there are several nodes."""
    return run_pipeline(mlp(width), (Canonicalise(), PackSiblings(), LiftWeights()), Context())


def test_assign_takes_the_first_kernel_that_accepts_and_records_refusals() -> None:
    picky = Kernel("linear", "fast", by_reference, (size("weight", 0, equals=4),), title="four")
    fast = Toy("fast", only=(), first=[picky])
    placed = Assign().run(lifted_mlp().graph, toy_context(fast, Toy("numpy")))
    first, *_, last = [n for n in placed.nodes if n.op.name == "linear"]
    assert last.placement.kernel == "fast.four" and not last.placement.refusals
    assert first.placement.kernel == "numpy.reference"
    assert [(r.kernel, r.reason) for r in first.placement.refusals] == [("fast.four", "axis 0 of weight is 12, not 4")]


def test_a_kernel_override_in_the_configuration_wins_over_the_order() -> None:
    ctx = toy_context(Toy("a"), Toy("b"), kernels={"linear": ("b", "a")})
    placed = Assign().run(lifted_mlp().graph, ctx)
    assert {n.op.name: n.placement.backend for n in placed.nodes} == {"linear": "b", "split": "a", "swiglu": "a", "add": "a"}


def test_assign_descends_into_parts_when_nobody_takes_the_whole() -> None:
    small = Toy("small", only=("linear", "split", "add", "mul", "silu", "cast"))
    placed = Assign().run(lifted_mlp().graph, toy_context(small))
    assert "swiglu" not in [n.op.name for n in placed.nodes] and {"silu", "mul"} <= {n.op.name for n in placed.nodes}
    x, params = RNG.standard_normal((1, 2, 4), np.float32), weights_of(mlp())
    np.testing.assert_allclose(meaning(placed, x, params), meaning(mlp(), x, params), rtol=1e-6)


def test_nobody_can_run_it_is_an_error_with_every_refusal() -> None:
    picky = Kernel("linear", "fast", by_reference, (size("weight", 0, equals=5),), title="five")
    with pytest.raises(CompileError, match=r"nobody can run %mlp\.linear(.|\n)*fast\.five: axis 0 of weight is 12, not 5"):
        Assign().run(lifted_mlp().graph, toy_context(Toy("fast", only=(), first=[picky])))


def wants_transposed(op: Any, x: Any, weight: Any) -> Any:
    return x @ weight


def test_prepack_lets_the_costlier_user_of_a_weight_decide() -> None:
    """An embedding and a head share a large weight: the head's wish is refused or granted, and the loser is reported."""
    g = GraphBuilder("tied")
    x = g.input("x", f32[BATCH, SEQ, 512])
    table = g.param("table", [1024, 512])
    ids = g.input("ids", i64[BATCH, SEQ])
    g.output("y", g.linear(g.add(x, g.embedding(ids, table)), table))
    fast = Kernel("linear", "numpy", wants_transposed, wants={"weight": (1, 0)})
    ctx = toy_context(Toy("numpy", first=[fast]))
    shared = run_pipeline(g.build(), SHARED, ctx)
    placed = Assign().run(shared.graph, ctx)
    decided, conflicts = decide_layouts([placed])
    assert decided == {("tied", "table", "numpy"): (1, 0)} or decided == {("tied", "table", "numpy"): (0, 1)}
    (conflict,) = conflicts
    assert conflict.lost != conflict.kept and conflict.weight == ("tied", "table", "numpy")
    if conflict.kept == (0, 1):
        again = Assign(decided).run(shared.graph, ctx)
        linear = next(n for n in again.nodes if n.op.name == "linear")
        assert linear.placement.kernel == "numpy.reference" and "prepack decided" in linear.placement.refusals[0].reason


def test_a_layout_can_only_be_wanted_of_a_weight() -> None:
    g = GraphBuilder("computed")
    x = g.input("x", f32[3, 4])
    g.output("y", g.linear(x, x))
    fast = Kernel("linear", "numpy", wants_transposed, wants={"weight": (1, 0)})
    ctx = toy_context(Toy("numpy", first=[fast]))
    placed = Assign().run(run_pipeline(g.build(), SHARED, ctx).graph, ctx)
    assert placed.nodes[0].placement.kernel == "numpy.reference"
    assert "computed, not a weight" in placed.nodes[0].placement.refusals[0].reason


def run_program(graph: Graph, ctx: Context, x: Any, params: dict[str, Any]) -> Any:
    placed = run_pipeline(lifted_mlp().graph, (Assign(), Transfers()), ctx, properties=frozenset({"lifted"})).graph
    program = emit(placed, ctx, "test")
    made = {**params, **interpret(placed.weights, {}, params.__getitem__, {}).outputs}
    slots = program.signatures[""].weights
    weights = {"": tuple(made[slot.value.name] for slot in slots)}
    assert not any(slot.axes for slot in slots)
    return program, program.run(x, weights, {"": ()}, {"": ()})[0]


@pytest.mark.parametrize("second", [("swiglu",), ("linear", "add"), ("split",)])
def test_mixed_backends_run_with_explicit_transfers(second: tuple[str, ...]) -> None:
    ctx = toy_context(Toy("home"), Toy("away"), kernels=dict.fromkeys(second, ("away",)))
    x, params = RNG.standard_normal((2, 3, 4), np.float32), weights_of(mlp())
    program, y = run_program(mlp(), ctx, x, params)
    np.testing.assert_array_equal(y, meaning(mlp(), x, params))
    crossings = [n for n in program.graph.nodes if n.op.name == "transfer"]
    assert crossings and all(n.op.source != n.op.target for n in crossings)
    assert "away.from_host(home.to_host(" in program.source


def test_a_graph_without_nodes_gives_its_input() -> None:
    g = GraphBuilder("idle")
    g.output("y", g.input("x", f32[2, 3]))
    ctx, x = toy_context(Toy("home"), Toy("away")), RNG.standard_normal((2, 3), np.float32)
    placed = run_pipeline(
        run_pipeline(g.build(), SHARED, ctx).graph, (Assign(), Transfers()), ctx, properties=frozenset({"lifted"})
    )
    (y,) = emit(placed.graph, ctx, "test").run(x, {"": ()}, {"": ()}, {"": ()})
    assert (y == x).all()


def test_a_compiling_backend_gets_its_segments_as_functions_to_finish() -> None:
    compiler = Toy("inductor")
    compiler.compiles = True
    x, params = RNG.standard_normal((2, 3, 4), np.float32), weights_of(mlp())
    program, y = run_program(mlp(), toy_context(compiler), x, params)
    assert compiler.finished == ["mlp_0"] and "def mlp_0(" in program.source
    np.testing.assert_array_equal(y, meaning(mlp(), x, params))


class NeedsSharding(Pass):
    name = "needs"
    requires = ("sharded",)


class Breaks(Pass):
    name = "breaks"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        raise CompileError("this pass never works")


def test_an_order_whose_requirement_is_not_met_is_refused_before_anything_runs() -> None:
    with pytest.raises(CompileError, match="'needs' requires 'sharded', which no earlier pass establishes .ran: canonicalise"):
        run_pipeline(mlp(), (Canonicalise(), NeedsSharding()), Context())
    with pytest.raises(CompileError, match="run canonicalise before it"):
        run_pipeline(mlp(), (LiftWeights(), Canonicalise()), Context())


def test_a_failing_pass_leaves_its_input_in_a_repro_folder(tmp_path: Path) -> None:
    ctx = Context(CompileConfig(dump=str(tmp_path)))
    with pytest.raises(CompileError, match="never works"):
        run_pipeline(mlp(), (Canonicalise(), Breaks()), ctx)
    assert (tmp_path / "mlp-shared-01-canonicalise.txt").read_text().startswith("graph mlp")
    assert (tmp_path / "repro" / "breaks" / "graph.txt").read_text().startswith("graph mlp")


def test_the_script_in_a_repro_folder_fails_as_the_pass_did(tmp_path: Path) -> None:
    graph = LiftWeights().run(mlp(), Context())
    impossible = {("mlp", value.name, "numpy"): (7, 7) for value in graph.params}
    ctx = Context(CompileConfig(dump=str(tmp_path)), (backend("numpy"),))
    with pytest.raises(CompileError, match="but prepack decided .7, 7.") as caught:
        run_pipeline(graph, (Assign(impossible),), ctx, properties=frozenset({"lifted"}))
    script = tmp_path / "repro" / "assign" / "run.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and str(caught.value) in done.stderr, done.stderr


def test_the_driver_gives_one_ledger_row_a_pass() -> None:
    driver = Driver(mlp(), toy_context(Toy("numpy")), planned=(Variant(False, False, ("y",)),))
    driver.program(Variant(False, False, ("y",)))
    assert [row.name for row in driver.ledgers["shared"]] == [step.name for step in SHARED]
    assert driver.ledgers["shared"][-1].after == {"mlp": 4}
    assert [row.name for row in driver.ledgers["prefill -> y"]][-2:] == ["assign", "transfers"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"backend": "numpy"}, "unknown key 'backend'"),
        ({"backends": []}, "expected a name or a list"),
        ({"backends": ["numpy", "numpy"]}, "names numpy twice"),
        ({"prefill_chunk": 0}, "expected at least 1"),
        ({"prefill_chunk": "8"}, "expected a whole number"),
        ({"threads": True}, "expected a whole number"),
        ({"kernels": {"linear": 3}}, "kernels.linear is 3"),
        ({"kernels": {"linear": "torch"}}, "kernels.linear names torch, which backends .numpy. does not"),
    ],
)
def test_bad_compile_configurations_are_refused_with_a_sentence(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_config(table)
