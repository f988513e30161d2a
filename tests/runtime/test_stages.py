"""Stages of a graph, its nodes by name, and the reasons that programs have: as objects, on models made by hand and the tiny one."""

from functools import cache

import pytest

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError, GraphError
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.compilations import count_compilations
from deltaloom.runtime.stages import numbered


@cache
def tiny() -> deltaloom.CompiledModel:
    return deltaloom.compile(deltaloom.build_graph("tiny-next").main)


def own() -> Graph:
    """Two branches that add up: the sum is fused with a norm behind it."""
    g = GraphBuilder("mine")
    x = g.input("x", f32[symbol("batch"), symbol("seq"), 8])
    gate = g.linear(x, g.param("gate", [16, 8]), name="gate_proj")
    up = g.linear(x, g.param("up", [16, 8]), name="up_proj")
    g.output("y", g.linear(g.swiglu(gate, up, name="act"), g.param("down", [8, 16]), name="out"))
    return g.build()


def test_stages_are_the_passes_in_their_order() -> None:
    names = tiny().stages.names()
    assert names[0] == "given" and names.index("fold") < names.index("pack_siblings") < names.index("canonicalise.2")
    assert names.index("lift_weights") < names.index("shared") < names.index("prefill")
    assert {"decode.assign", "mixed.serving_layout", "verify.transfers"} <= set(names)
    assert not {"quantise", "shard"} & set(names), "they have nothing to do"
    with_quantise = deltaloom.compile(own(), CompileConfig(quantise={"*": "int8"}))
    assert "quantise" in with_quantise.stages.names()


def test_the_graph_of_each_stage() -> None:
    model = deltaloom.compile(own())
    ops = {stage: [node.op.name for node in model.graph(stage).nodes] for stage in model.stages.names() if "mixed" not in stage
           and "verify" not in stage and "serving" not in stage}  # fmt: skip
    assert ops["given"] == ["linear", "linear", "swiglu", "linear"]
    assert ops["pack_siblings"] != ops["fold"] and "concat" in ops["pack_siblings"]
    assert ops["shared"] == ops["lift_weights"] and "concat" not in ops["shared"]
    assert (
        model.graph("decode.assign").nodes[0].placement is not None and model.graph("decode.specialise").nodes[0].placement is None
    )
    assert str(model.graph("decode")) == str(model.graph("decode.transfers"))
    assert model.diff("given", "given") == "" and "removed" in model.diff("given", "shared")


def test_fuel_holds_for_stages_too() -> None:
    """What is shown is what was compiled: a stage after a rewrite without fuel is the stage before it."""
    model = deltaloom.compile(deltaloom.build_graph("tiny-next").main, CompileConfig(fuel=0))
    assert model.diff("pack_siblings", "fuse") != model.diff("canonicalise.2", "fuse") == ""
    assert str(model.graph("lift_weights")) == str(model.graph("shared"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("decode.fuse", "there is no stage 'decode.fuse'"),
        ("sharded", "did you mean shared"),
        ("xyzzy", "there is given, canonicalise, .* prefill, decode, mixed"),
    ],
)
def test_unknown_stages_are_refused(stage: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        tiny().graph(stage)


def test_repeated_names_have_numbers() -> None:
    assert numbered(["a", "b", "a", "mylab.a", "a"]) == ("a", "b", "a.2", "mylab.a", "a.3")


def test_a_node_and_what_it_was_made_from() -> None:
    found = tiny().node("model.layers.4.linear_attn.delta_rule.new_state")
    assert (found.body, found.node.op.name, len(found.prefixes)) == ("linear_layer", "gated_delta_net", 6)
    stages = dict(found.made_from)
    assert list(stages)[0] == "given" and list(stages)[-1] in ("fuse", "lift_weights")
    given = {node.op.name for node in stages["given"]}
    assert {"causal_conv1d", "l2_norm", "delta_gates", "gated_delta_rule", "gated_rms_norm"} <= given
    assert any(node.source.startswith("models/qwen3_next/") for node in stages["given"])
    assert tiny().node("linear_layer/mlp.mixture").body == "linear_layer"
    assert tiny().node("%embed", "given").made_from == ()
    call = tiny().node("layers.0.x")
    assert call.cost is None and call.node.op.name == "call"


@pytest.mark.parametrize("name", ["", "%", "/", "nothing/mlp.mixture", "model.layers.8.mlp.mixture", "model.layers.0.embed"])
def test_a_node_that_is_not_there(name: str) -> None:
    with pytest.raises(GraphError, match="has no node"):
        tiny().node(name)


def test_reasons_of_a_program() -> None:
    found = tiny().explanation(("prefill", "decode"))
    (apart,) = found.programs["prefill"].taken_apart
    assert (apart.rule, apart.graph) == ("gated_delta_net", "linear_layer") and "is seq, not 1" in apart.reason
    assert found.programs["decode"].taken_apart == () and found.programs["decode"].calls["linear_layer"] == 6
    about = found.about(op="gated_delta_net")
    assert not about.programs["prefill"].kernels and len(about.programs["decode"].kernels) == 1
    assert {rule.rule for rule in about.rules} == {"gated_delta_net"}
    kinds = [rule.kind for rule in found.rules]
    assert kinds == sorted(kinds, key="hit near miss refused".find) and "near miss" in kinds


def test_copies_between_backends_are_listed() -> None:
    pytest.importorskip("torch")
    config = CompileConfig(backends=("numpy", "torch"), kernels={"swiglu": ("torch",)}, skip=("fuse", "pack_siblings"))
    reasons = deltaloom.compile(own(), config).explanation(("decode",)).programs["decode"]
    assert len(reasons.transfers) >= 2 and all(name.startswith("mine/") for name in reasons.transfers)


def test_counting_needs_a_backend_that_compiles() -> None:
    with pytest.raises(CompileError, match=r"none of the model's backends \(numpy\) compiles"):
        count_compilations(deltaloom.load("tiny-next"))


@pytest.mark.slow
def test_inductor_keeps_its_budget_and_breaks_no_graph() -> None:
    pytest.importorskip("torch")
    model = deltaloom.load("tiny-next", config=CompileConfig(backends=("inductor",)))
    found = count_compilations(model)["inductor"]
    assert found.graph_breaks == 0 and found.compilations
    assert max(found.compilations.values()) <= 4
