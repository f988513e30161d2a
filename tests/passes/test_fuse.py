"""The built-in fusions: each says no where it must, and whole models keep their meaning and end in few nodes."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.golden_data import VARIANTS, cases
from goldens.reference_model import ReferenceModel

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.ir import Graph, Node
from deltaloom.graph.types import bf16, f32, f64
from deltaloom.graph.verify import verify
from deltaloom.models.build import build_graph
from deltaloom.models.config import read_config
from deltaloom.passes.fuse.attention import FuseGatedAttention, FuseGatedQKVNormRope, FuseQKVNormRope
from deltaloom.passes.fuse.convolution import FuseConvSilu
from deltaloom.passes.fuse.delta_net import FuseGatedDeltaNet
from deltaloom.passes.fuse.norm import FuseAddRMSNorm
from deltaloom.passes.fuse.passes import Fold, Fuse
from deltaloom.passes.fuse.router import FuseGatedRouter
from deltaloom.passes.fuse.shared_expert import FoldSharedExpert
from deltaloom.passes.fuse.swiglu import FusePackedSwiglu
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.passes.pipeline import Compiled, Context, Event, Fuel, run_pipeline
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.rule import Rule
from deltaloom.passes.specialise import AssumeUnpadded, SelectOutputs, Specialise
from deltaloom.passes.table import SHARED, make_pass
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete
from deltaloom.testing.rules import pattern_graph

BATCH, SEQ = symbol("batch"), symbol("seq")
ROOT = Path(__file__).parents[1]
UNLIFTED = tuple(step for step in SHARED if step != "lift_weights")


def example(rule: Rule, seed: int = 1) -> Graph:
    """The pattern of a rule as a graph on which it fires."""
    drawn = rule.examples(SeededDraw(seed, sizes=(4, 6)))
    graph = pattern_graph(rule, drawn, concrete(drawn, f32))
    assert apply_rules(graph, [rule])[1][0].kind == "hit"
    return graph


def changed(graph: Graph, op: str, position: int, **attributes: Any) -> Graph:
    """``graph`` with other attributes at one of its nodes of an op."""
    node = [n for n in graph.nodes if n.op.name == op][position]
    nodes = tuple(replace(n, op=replace(n.op, **attributes)) if n is node else n for n in graph.nodes)
    result = replace(graph, nodes=nodes)
    verify(result)
    return result


def rewired(graph: Graph, op: str, position: int, inputs: tuple[int, ...]) -> Graph:
    """``graph`` with the inputs of one of its nodes of an op in another order."""
    node = [n for n in graph.nodes if n.op.name == op][position]
    other = replace(node, inputs=tuple(node.inputs[i] for i in inputs))
    result = replace(graph, nodes=tuple(other if n is node else n for n in graph.nodes))
    verify(result)
    return result


def reason(graph: Graph, rule: Rule) -> str:
    """Why the rule says no."""
    after, events = apply_rules(graph, [rule])
    assert after == graph and events and "hit" not in {event.kind for event in events}
    return " | ".join(f"{event.kind}: {event.reason}" for event in events)


@pytest.mark.parametrize(
    ("rule", "op", "position", "attributes", "message"),
    [
        (FuseConvSilu(), "causal_conv1d", 0, {"activation": "silu"}, "is 'silu', where the pattern has 'none'"),
        (FuseGatedDeltaNet(), "causal_conv1d", 0, {"activation": "none"}, "is 'none', where the pattern has 'silu'"),
        (FuseGatedDeltaNet(), "l2_norm", 0, {"eps": 0.5}, "eps of .* = l2_norm is .*, but 'l2_eps' is .* before"),
        (FuseQKVNormRope(), "rms_norm", 1, {"eps": 0.5}, "but 'eps' is .* before"),
        (FuseGatedQKVNormRope(), "rms_norm", 1, {"eps": 0.5}, "but 'eps' is .* before"),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else None,
)
def test_another_attribute_is_a_near_miss(rule: Rule, op: str, position: int, attributes: dict[str, Any], message: str) -> None:
    found = reason(changed(example(rule), op, position, **attributes), rule)
    assert found.startswith("near miss") and re.search(message, found), found


def test_halves_in_the_other_order_are_no_packed_swiglu() -> None:
    rule = FusePackedSwiglu()
    assert "again" in reason(rewired(example(rule), "swiglu", 0, (1, 0)), rule)


def test_queries_and_keys_with_other_angles_are_not_fused() -> None:
    for rule in (FuseQKVNormRope(), FuseGatedQKVNormRope()):
        assert "again" in reason(rewired(example(rule), "rope", 1, (0, 2, 1)), rule)


def test_gates_in_the_other_order_are_no_delta_net() -> None:
    rule = FuseGatedDeltaNet()
    assert "again" in reason(rewired(example(rule), "delta_gates", 0, (1, 0, 2, 3)), rule)


def test_a_norm_of_no_sum_is_a_near_miss() -> None:
    g = GraphBuilder("norm")
    x, weight = g.input("x", f32[BATCH, 4]), g.param("w", [4])
    g.output("y", g.rms_norm(g.mul(x, x, name="square"), weight, eps=1e-6))
    g.output("z", g.rms_norm(x, weight, eps=1e-6))
    found = reason(g.build(), FuseAddRMSNorm())
    assert "near miss: %square is made by mul, where the pattern has add" in found
    assert "near miss: %x is an input of the graph, where the pattern has add" in found


def router(gate_width: int) -> Graph:
    g = GraphBuilder("router")
    logits, gate = g.split(g.input("logits", f32[BATCH, SEQ, 6 + gate_width]), sizes=(6, gate_width))
    weights, ids = g.router_topk(logits, k=2, normalize=True)
    for name, value in (("weights", weights), ("ids", ids), ("gate", gate)):
        g.output(name, value)
    return g.build()


def test_a_router_beside_a_wider_part_is_left() -> None:
    assert [n.op.name for n in apply_rules(router(1), [FuseGatedRouter()])[0].nodes] == ["gated_router"]
    assert "sizes of %split.0 = split is 2, where the pattern has 1" in reason(router(2), FuseGatedRouter())


def gated(width: int) -> Graph:
    g = GraphBuilder("attention")
    q, k, v = (g.input(name, f32[BATCH, SEQ, heads, 4]) for name, heads in (("q", 2), ("k", 1), ("v", 1)))
    past = symbol("past", low=0)
    keys, values = (g.state(name, f32[BATCH, 1, past, 4], append_axis=2) for name in ("keys", "values"))
    out, new_keys, new_values = g.attention(q, k, v, keys, values, scale=0.5)
    g.update(keys=new_keys, values=new_values)
    g.output("y", g.sigmoid_gate(g.flatten(out), g.input("gate", f32[BATCH, SEQ, width])))
    return g.build()


def test_attention_with_one_gate_for_all_channels_is_refused() -> None:
    assert [n.op.name for n in apply_rules(gated(8), [FuseGatedAttention()])[0].nodes] == ["gated_attention"]
    assert "refused: the gate %gate: f32[batch, seq, 1] is not as large as the heads" in reason(gated(1), FuseGatedAttention())


def mixture(*, gate_width: int = 1, bias: bool = False, other_x: bool = False) -> Graph:
    g = GraphBuilder("mixture")
    x = g.input("x", f32[BATCH, SEQ, 4])
    shared_x = g.silu(x) if other_x else x
    weights, ids = g.router_topk(g.linear(x, g.param("router", [3, 4])), k=2, normalize=True)
    routed = g.moe_experts(x, weights, ids, g.param("gate_up", [3, 10, 4]), g.param("down", [3, 4, 5]))
    more = (g.param("bias", [6]),) if bias else ()
    inner = g.swiglu(g.linear(shared_x, g.param("gate", [6, 4]), *more), g.linear(shared_x, g.param("up", [6, 4]), *more))
    gate = g.linear(x, g.param("shared_gate", [gate_width, 4]))
    g.output("y", g.add(g.sigmoid_gate(g.linear(inner, g.param("shared_down", [4, 6])), gate), routed))
    return g.build()


def test_a_shared_expert_of_another_shape_is_left() -> None:
    rule = FoldSharedExpert()
    assert "shared_moe" in [n.op.name for n in apply_rules(mixture(), [rule])[0].nodes]
    assert "refused: the gate %linear" in reason(mixture(gate_width=4), rule)
    assert "has 3 inputs, the pattern 2" in reason(mixture(bias=True), rule)
    assert "again" in reason(mixture(other_x=True), rule)
    packed = PackSiblings().run(mixture(), Context())
    assert "is made by split, where the pattern has linear" in reason(packed, rule)


def step(model: ReferenceModel, graph: Graph, states: Any, *, past: int, new: int, mtp: bool) -> Any:
    """One run on a batch of two, of which the first row has two columns of padding."""
    rng = np.random.default_rng(past + 3)
    inputs: dict[str, Any] = {
        "next_ids" if mtp else "token_ids": rng.integers(0, model.config.vocab_size, (2, new)),
        "positions": np.arange(past, past + new)[None] - np.array([[2], [0]]) * (past > 0),
        "valid": np.arange(past + new) >= np.array([[2], [0]]),
    }
    inputs["positions"] = inputs["positions"].clip(0)
    if mtp:
        inputs["hidden"] = rng.standard_normal((2, new, model.config.hidden_size)).astype(graph.inputs[1].type.plain_dtype.numpy)
    given = {value.name: inputs[value.name] for value in graph.inputs}
    return model.run(graph, given, states)


def shared(graph: Graph, steps: tuple[Any, ...] = UNLIFTED) -> Compiled:
    return run_pipeline(graph, [make_pass(step) for step in steps], Context())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_model_computes_what_the_plain_one_does(variant: str) -> None:
    """In float64: every output, hidden states included, and every state, over two runs; main model and drafting head."""
    model = ReferenceModel(cases(variant)[0].folder, f64)
    for plain in filter(None, (model.graphs.main, model.graphs.mtp)):
        fused = shared(plain).graph
        states = [model.start(plain, 2)] * 2
        for past, new in ((0, 5), (5, 1)):
            want, found = (
                step(model, graph, state, past=past, new=new, mtp=plain is model.graphs.mtp)
                for graph, state in zip((plain, fused), states)
            )
            assert list(found.outputs) == list(want.outputs) and sorted(found.states) == sorted(want.states)
            for name, array in {**want.outputs, **want.states}.items():
                other = {**found.outputs, **found.states}[name]
                np.testing.assert_allclose(other, array, rtol=1e-7, atol=1e-9, err_msg=name)
            states = [want.states, found.states]


def test_fusion_rounds_at_the_same_places_in_bfloat16() -> None:
    model = ReferenceModel(cases("next_base")[0].folder, bf16)
    plain = model.graphs.main
    want, found = (step(model, graph, model.start(plain, 2), past=0, new=5, mtp=False) for graph in (plain, shared(plain).graph))
    for name, array in want.outputs.items():
        differing = np.mean(array != found.outputs[name])
        assert differing < 0.01, f"{name} differs in {differing:.1%} of its elements"


def decode(graph: Graph, output: str = "last_logits") -> Graph:
    done = shared(graph, SHARED)
    passes = (SelectOutputs((output,)), AssumeUnpadded(), Specialise(1))
    return run_pipeline(done.graph, passes, Context(), properties=done.properties).graph


def names(nodes: tuple[Node, ...]) -> list[str]:
    return [node.op.name for node in nodes]


MLP = ["add_rms_norm", "linear", "gated_router", "shared_moe"]
LINEAR_LAYER = ["add_rms_norm", "linear", "gated_delta_net", "linear", *MLP]
ATTENTION_LAYER = ["add_rms_norm", "linear", "qkv_norm_rope", "gated_attention", "linear", *MLP]


@pytest.mark.parametrize("source", ["models/tiny_next/config.json", "tests/models/config_80b.json"])
def test_layer_bodies_end_in_eight_and_nine_nodes(source: str) -> None:
    config = read_config(json.loads((ROOT.parent / source).read_text()))
    graphs = build_graph(config, dtype=bf16)
    main = decode(graphs.main)
    assert names(main.regions["linear_layer"].nodes) == LINEAR_LAYER and len(LINEAR_LAYER) == 8
    assert names(main.regions["attention_layer"].nodes) == ATTENTION_LAYER and len(ATTENTION_LAYER) == 9
    calls = config.num_hidden_layers
    last = ["take_last", "take_last", "add_rms_norm", "linear"]
    assert names(main.nodes) == ["rotary_embedding", "embedding", "zeros_like", *["call"] * calls, *last]
    if graphs.mtp is not None:
        assert names(decode(graphs.mtp).regions["mtp_attention_layer"].nodes) == ATTENTION_LAYER


def test_other_families_are_fused_as_far_as_they_go() -> None:
    bodies = {}
    for variant in ("qwen3_dense", "qwen3_moe", "next_dense_mix"):
        bodies[variant] = decode(build_graph(read_config(cases(variant)[0].folder)).main).regions
    attention = ["add_rms_norm", "linear", "qkv_norm_rope", "attention", "flatten", "linear", "add_rms_norm", "linear"]
    assert names(bodies["qwen3_dense"]["attention_layer_dense"].nodes) == [*attention, "packed_swiglu", "linear"]
    assert names(bodies["qwen3_moe"]["attention_layer"].nodes) == [*attention, "router_topk", "moe_experts"]
    dense = bodies["next_dense_mix"]["linear_layer_dense"]
    assert names(dense.nodes) == [*LINEAR_LAYER[:6], "packed_swiglu", "linear"]


def test_the_ledger_tells_what_fired_and_what_did_not() -> None:
    config = read_config(ROOT.parent / "models" / "tiny_next")
    done = shared(build_graph(config).main)
    by_pass: dict[str, list[Event]] = {row.name: list(row.events) for row in done.ledger}
    hits = Counter(event.rule for row in done.ledger for event in row.events if event.kind == "hit")
    assert hits == {
        "shared_expert": 2,
        "add_rms_norm": 2,
        "gated_attention": 1,
        "gated_delta_net": 1,
        "gated_qkv_norm_rope": 1,
        "gated_router": 2,
        "border_fusion": 2,
    }
    assert any(e.kind == "near miss" and e.rule == "conv_silu" and "'silu'" in e.reason for e in by_pass["fold"])
    assert any(e.kind == "near miss" and e.node == "input_layernorm" for e in by_pass["fuse"])


def test_fuel_is_shared_by_all_passes_and_regions() -> None:
    graph = build_graph(read_config(ROOT.parent / "models" / "tiny_next")).main
    for limit in (0, 1, 3, 9):
        passes = [make_pass(step) for step in UNLIFTED]
        done = run_pipeline(graph, passes, Context(fuel=Fuel(limit)))
        assert sum(event.kind == "hit" for row in done.ledger for event in row.events) == limit
        assert any(event.kind == "out of fuel" for row in done.ledger for event in row.events)
    one = Fuse(fuel=1).run(graph, Context())
    assert sum(n.op.name == "add_rms_norm" for region in one.regions.values() for n in region.nodes) == 1


def test_a_pass_may_be_given_other_rules() -> None:
    graph = build_graph(read_config(ROOT.parent / "models" / "tiny_next")).main
    after = Fuse(rules=("add_rms_norm",)).run(graph, Context())
    found = Counter(n.op.name for region in after.regions.values() for n in region.nodes)
    assert found["add_rms_norm"] == 2 and not found["gated_attention"]
    assert Fold(rules=()).run(graph, Context()) == graph
