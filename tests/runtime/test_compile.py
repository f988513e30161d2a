"""``deltaloom.compile``: programs, graphs by stage, ledgers and reasons of any graph; and weights for it."""

import warnings
from functools import cache

import numpy as np
import pytest

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CheckpointError, CompileError, ConfigError, GraphError
from deltaloom.graph.ir import Graph
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.types import f32
from deltaloom.passes.driver import driver_key, plain_variants
from deltaloom.passes.shard.plan import Divide

BATCH, SEQ = symbol("batch"), symbol("seq")


def own() -> Graph:
    """A graph that belongs to no family: a running convolution, then a gated projection."""
    g = GraphBuilder("mine")
    x = g.input("x", f32[BATCH, SEQ, 4])
    taps = g.state("taps", f32[BATCH, 4, 2])
    h, new = g.causal_conv1d(x, g.param("conv", [4, 1, 3]), taps)
    g.update(taps=new)
    gate, up = g.linear(h, g.param("gate", [8, 4])), g.linear(h, g.param("up", [8, 4]))
    g.output("y", g.linear(g.swiglu(gate, up), g.param("down", [4, 8])))
    g.output("h", h)
    return g.build()


@cache
def tiny() -> deltaloom.CompiledModel:
    return deltaloom.compile(deltaloom.build_graph("tiny-next").main)


def test_a_graph_of_ones_own_runs_as_its_definition_says() -> None:
    rng = np.random.default_rng(4)
    weights = {name: rng.standard_normal(type_.static_shape(), np.float32) for name, type_ in own().all_params().items()}
    x = rng.standard_normal((2, 5, 4), np.float32)
    past = np.concatenate([np.zeros((2, 2, 4), np.float32), x], axis=1)
    h = sum(past[:, i : i + 5] * weights["conv"][:, 0, i] for i in range(3))
    gate, up = h @ weights["gate"].T, h @ weights["up"].T
    y = (gate / (1 + np.exp(-gate)) * up) @ weights["down"].T
    bound = deltaloom.compile(own()).bind(weights)
    state = bound.new_state(2)
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        got = bound.run({"x": x[:, part]}, state, None, ("y", "h"))
        np.testing.assert_allclose(got["h"], h[:, part], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["y"], y[:, part], rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_missing_is_named() -> None:
    bound = deltaloom.compile(own()).bind({"conv": np.zeros((4, 1, 3), np.float32)})
    with pytest.raises(CheckpointError, match="the weights have no 'gate'"):
        bound.run({"x": np.zeros((1, 1, 4), np.float32)}, bound.new_state(1), None, ("y",))


def test_a_graph_can_be_looked_at_at_every_stage() -> None:
    compiled, given = deltaloom.compile(own()), own()
    assert str(compiled.graph("given")) == str(given)
    assert compiled.graph().weights is not None and compiled.graph() is compiled.graph("shared")
    for kind, seq in (("prefill", SEQ), ("decode", 1)):
        placed = compiled.graph(kind)
        assert all(node.placement for node in placed.nodes) and placed.inputs[0].type.shape == (BATCH, seq, 4)
        assert parse_graph(str(placed)).outputs == placed.outputs
    with pytest.raises(CompileError, match="no stage 'final' of graph 'mine'; there is given, canonicalise, .*, shared, prefill"):
        compiled.graph("final")


def test_programs_by_kind_and_outputs() -> None:
    compiled = deltaloom.compile(own())
    assert compiled.program("prefill").outputs == ("y", "h")
    assert compiled.program("decode", outputs=("h",)).outputs == ("h",)
    assert "swiglu" not in compiled.program("decode", outputs=("h",)).source
    assert compiled.source("decode") == compiled.program("decode").source and "def mine(" in compiled.source("decode")
    assert "valid" in [value.name for value in tiny().program("decode", outputs=("last_logits",), padded=True).graph.inputs]
    with pytest.raises(CompileError, match="no program 'verify'; there is prefill and decode"):
        compiled.program("verify")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="no output 'z'; it has y, h"):
        compiled.program("decode", outputs=("z",))


def test_the_ledger_and_the_reasons_of_kernels() -> None:
    compiled = deltaloom.compile(own())
    assert list(compiled.ledger) == ["shared", "prefill -> y, h", "decode -> y, h"]
    assert [row.name for row in compiled.ledger["decode -> y, h"]][-2:] == ["assign", "transfers"]
    rows = compiled.explain("decode")
    placed = compiled.graph("decode")
    assert sorted(name for row in rows for name in row.nodes) == sorted(node.name for node in placed.nodes)
    kernels = {node.name: node.placement.kernel for node in placed.nodes if node.placement}
    assert all(kernels[name] == row.kernel for row in rows for name in row.nodes)
    refusals = [refusal for row in tiny().explain("prefill") for refusal in row.refusals]
    assert refusals and all(refusal.reason for refusal in refusals)


def test_a_mesh_needs_to_know_what_it_divides() -> None:
    config = deltaloom.CompileConfig(mesh={"tp": 2})
    with pytest.raises(ConfigError, match="nothing says how a mesh divides the graph 'mine'; known are .*qwen3_next"):
        deltaloom.compile(own(), config)
    plan = (Divide("down", "i"),)
    shared = deltaloom.compile(own(), config, plan=plan)
    assert "all_reduce" in {node.op.name for node in shared.graph().nodes}
    assert deltaloom.compile(own(), deltaloom.CompileConfig(mesh={"tp": 1})).graph() == deltaloom.compile(own()).graph()
    one, other = (driver_key(own(), shared.driver.ctx, planned=plain_variants(("y", "h")), plan=given) for given in (plan, ()))
    assert one.digest != other.digest


def test_a_family_has_a_plan() -> None:
    graph = deltaloom.build_graph("tiny-next").main
    local = deltaloom.compile(graph, deltaloom.CompileConfig(mesh={"tp": 2})).graph()
    assert any(node.op.name == "all_reduce" for region in local.regions.values() for node in region.nodes)


def test_one_process_loads_whole_models_only() -> None:
    for mesh, reason in (
        ({"tp": 2}, "mesh tp=2 .* running more than one rank is not supported yet; deltaloom.runtime.lockstep simulates"),
        ({"tp": 3}, "does not fit this model: 4 query heads cannot be divided over tp = 3"),
        ({"ep": 2}, "does not fit this model: experts cannot be divided over ep"),
    ):
        with pytest.raises(ConfigError, match=reason):
            deltaloom.load("tiny-next", config=deltaloom.CompileConfig(mesh=mesh))
    assert deltaloom.load("tiny-next", config=deltaloom.CompileConfig(mesh={"tp": 1})).main.name == "qwen3_next"


def test_an_override_of_an_op_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="kernels.lineal: there is no op 'lineal'"):
        deltaloom.compile(own(), deltaloom.CompileConfig(kernels={"lineal": ("numpy",)}))


def test_serving_programs_come_from_the_same_driver() -> None:
    for kind, drafts in (("decode", 0), ("verify", 3)):
        program = tiny().serving(kind, outputs=("last_logits",), drafts=drafts)
        assert program.outputs == ("last_logits",)
        assert "read_slots" in {value.name for value in program.graph.inputs}
        assert max(len(region.nodes) for region in program.graph.regions.values()) <= 9
    assert "query_starts" in {value.name for value in tiny().serving("mixed").graph.inputs}
    with pytest.raises(CompileError, match="there is no serving program 'prefill'"):
        tiny().serving("prefill")
    with pytest.raises(GraphError, match="no output 'nothing'"):
        tiny().serving("mixed", outputs=("nothing",))


def test_a_program_does_not_warn_of_activations_that_overflow() -> None:
    g = GraphBuilder("far")
    g.output("y", g.silu(g.input("x", f32[BATCH, SEQ, 2])))
    bound = deltaloom.compile(g.build()).bind({})
    x = np.array([[[-1000.0, 1000.0]]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (y,) = bound.run({"x": x}, bound.new_state(1), None, ("y",)).values()
    assert y.tolist() == [[[0.0, 1000.0]]]
