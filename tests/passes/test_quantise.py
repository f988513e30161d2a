"""Quantise: which weights get which form, and that the rewritten graph means the old one with its weights rounded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError, ConfigError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Call, Graph
from deltaloom.graph.types import QuantType, bf16, f8_e4m3, f32, i4, i8
from deltaloom.ops.quantized import Dequantize, Quantize
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.config import CompileConfig, compile_config
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.passes.pipeline import Context, Event, run_pipeline
from deltaloom.passes.quantise import Quantise
from deltaloom.passes.quantise_policy import SCHEMES, check_matches, most_exact, quantise_policy, scheme_of, scheme_type

BATCH, SEQ = symbol("batch"), symbol("seq")
FP8 = QuantType(f8_e4m3, (4, 8), f32)
Build = Callable[[GraphBuilder, Any], Any]


def region(build: Build, *, width: int = 8, name: str = "layer") -> Graph:
    g = GraphBuilder(name)
    g.output("out", build(g, g.input("x", f32[BATCH, SEQ, width])))
    return g.build()


def model(body: Graph, prefixes: tuple[str, ...] = ("layers.0.", "layers.1.")) -> Graph:
    g = GraphBuilder("model")
    x = g.input("x", body.inputs[0].type)
    for prefix in prefixes:
        x = g.call(body, x, prefix=prefix)
    g.output("y", x)
    return g.build()


def run(graph: Graph, *, policy: object = (), keep: bool = False, pack: bool = True) -> tuple[Graph, list[Event]]:
    passes = [Canonicalise(), *([PackSiblings()] if pack else []), Quantise(quantise_policy(policy), keep)]
    done = run_pipeline(graph, passes, Context())
    return done.graph, list(done.ledger[-1].events)


def weights_of(graph: Graph, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}
    for name, type_ in graph.all_params().items():
        w = rng.standard_normal(type_.static_shape()).astype(np.float32)
        made[name] = Quantize(str(type_.dtype)).reference(w) if isinstance(type_.dtype, QuantType) else w
    return made


def rounded(params: dict[str, Any], forms: dict[str, QuantType]) -> dict[str, Any]:
    """The parameters with some of them quantised and dequantised."""
    found = dict(params)
    for name, form in forms.items():
        found[name] = Dequantize("float32").reference(Quantize(str(form)).reference(params[name]))
    return found


def meaning(graph: Graph, params: dict[str, Any]) -> Any:
    type_ = graph.inputs[0].type.substitute({"batch": 2, "seq": 3})
    x = np.random.default_rng(9).standard_normal(type_.static_shape()).astype(np.float32)
    return interpret(graph, {"x": x}, params.__getitem__, {}).outputs["y"]


def mixer(g: GraphBuilder, x: Any) -> Any:
    """Three linears of one input, which are packed: two that may be quantised, and one that stays plain unless it is named."""
    parts = [
        g.linear(x, g.param(f"{name}.weight", [rows, 8]), g.param(f"{name}.bias", [rows]), name=name)
        for name, rows in (("q_proj", 4), ("in_proj_ba", 2), ("v_proj", 2))
    ]
    return g.linear(g.concat(*parts, axis=-1), g.param("o_proj.weight", [8, 8]), name="out")


def ops_of(graph: Graph) -> list[str]:
    return [node.op.name for node in graph.nodes]


def consumers(graph: Graph) -> dict[str, str]:
    """Dtype of the weight of every linear, by name."""
    return {node.name: str(node.inputs[1].type.dtype) for node in graph.nodes if node.op.name == "linear"}


def test_without_a_policy_the_graph_is_the_same_object() -> None:
    graph = model(region(mixer))
    assert Quantise().run(graph, Context()) is graph


def test_a_weight_is_quantised_before_its_product_and_lifted_with_it() -> None:
    graph = model(region(mixer))
    params = weights_of(graph)
    after, _ = run(graph, policy="int8", pack=False)
    found = consumers(after.regions["layer"])
    assert found == {**dict.fromkeys(("q_proj", "v_proj", "out"), "int8{row, scale f32}"), "in_proj_ba": "f32"}
    names = [f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj", "o_proj")]
    want = meaning(graph, rounded(params, dict.fromkeys(names, SCHEMES["int8"])))
    np.testing.assert_allclose(meaning(after, params), want, rtol=1e-6, atol=1e-6)
    assert np.abs(meaning(after, params) - meaning(graph, params)).max() > 1e-4
    lifted = run_pipeline(after, [LiftWeights()], Context(), properties=frozenset({"canonical"})).graph
    assert "quantize" not in ops_of(lifted.regions["layer"])
    made = lifted.regions["layer"].weights
    assert made is not None and ops_of(made).count("quantize") == 3
    assert lifted.all_params() == graph.all_params()


def test_a_packed_weight_of_several_forms_is_taken_apart_with_its_bias() -> None:
    graph = model(region(mixer))
    params = weights_of(graph)
    after, events = run(graph, policy=[("*q_proj*", "int4_g8"), ("*", "int8")])
    body = after.regions["layer"]
    assert [str(n.inputs[1].type) for n in body.nodes if n.op.name == "linear"] == [
        "int4{group 8, scale bf16}[4, 8]",
        "f32[2, 8]",
        "int8{row, scale f32}[2, 8]",
        "int8{row, scale f32}[8, 8]",
    ]
    forms = {}
    for layer in ("layers.0.", "layers.1."):
        forms |= {layer + "q_proj.weight": QuantType(i4, (1, 8), bf16)}
        forms |= {layer + name: SCHEMES["int8"] for name in ("v_proj.weight", "o_proj.weight")}
    np.testing.assert_allclose(meaning(after, params), meaning(graph, rounded(params, forms)), rtol=1e-5, atol=1e-5)
    assert [event.kind for event in events] == ["hit", "refused", "hit", "hit"]
    assert "in_proj_ba.weight stays plain" in events[1].reason


def test_bfloat16_is_a_cast_of_every_weight_of_a_product() -> None:
    graph = model(region(mixer))
    params = weights_of(graph)
    after, events = run(graph, policy="bf16")
    body = after.regions["layer"]
    assert set(consumers(body).values()) == {"bf16"} and ops_of(body).count("linear") == 2  # in_proj_ba too, so all stay packed
    assert {event.kind for event in events} == {"hit"} and events[0].reason.endswith("becomes bf16")
    narrow = {name: w.astype(bf16.numpy).astype(np.float32) if name.endswith("weight") else w for name, w in params.items()}
    np.testing.assert_allclose(meaning(after, params), meaning(graph, narrow), rtol=1e-6, atol=1e-6)
    assert np.abs(meaning(after, params) - meaning(graph, params)).max() > 1e-4


def test_bfloat16_changes_nothing_where_weights_are_that_already() -> None:
    g = GraphBuilder("narrow")
    g.output("y", g.linear(g.input("x", bf16[BATCH, SEQ, 8]), g.param("w", [4, 8], bf16)))
    graph = g.build()
    assert run(graph, policy="bf16")[0] == graph


def test_a_weight_may_be_bfloat16_beside_others_that_are_quantised() -> None:
    graph = model(region(mixer))
    params = weights_of(graph)
    after, _ = run(graph, policy=[("*_ba*", "bf16"), ("*", "int8")])
    assert list(consumers(after.regions["layer"]).values()) == [
        "int8{row, scale f32}",
        "bf16",
        "int8{row, scale f32}",
        "int8{row, scale f32}",
    ]
    forms = {f"layers.{n}.{name}.weight": SCHEMES["int8"] for n in (0, 1) for name in ("q_proj", "v_proj", "o_proj")}
    narrow = {k: w.astype(bf16.numpy).astype(np.float32) if k.endswith("_ba.weight") else w for k, w in params.items()}
    np.testing.assert_allclose(meaning(after, params), meaning(graph, rounded(narrow, forms)), rtol=1e-5, atol=1e-5)


def test_equal_forms_stay_packed() -> None:
    after, _ = run(model(region(mixer)), policy={"*in_proj_ba*": "int8", "*": "int8"})
    assert ops_of(after.regions["layer"]).count("linear") == 2


def test_layers_of_other_forms_get_a_body_of_their_own() -> None:
    prefixes = ("layers.0.", "layers.1.", "layers.2.")
    graph = model(region(mixer), prefixes)
    params = weights_of(graph)
    after, _ = run(graph, policy={"layers.1.*": "plain", "*": "int8"})
    calls = [node.op for node in after.nodes if isinstance(node.op, Call)]
    assert [call.prefix for call in calls] == list(prefixes)
    assert calls[0].region == calls[2].region != calls[1].region and len(after.regions) == 2
    assert "quantize" not in ops_of(after.regions[calls[1].region])
    forms = {f"layers.{layer}.{name}.weight": SCHEMES["int8"] for layer in (0, 2) for name in ("q_proj", "v_proj", "o_proj")}
    np.testing.assert_allclose(meaning(after, params), meaning(graph, rounded(params, forms)), rtol=1e-5, atol=1e-5)


def experts(g: GraphBuilder, x: Any) -> Any:
    parts = [
        g.concat(g.param(f"experts.{e}.gate_proj.weight", [3, 8]), g.param(f"experts.{e}.up_proj.weight", [3, 8]), axis=0)
        for e in range(2)
    ]
    down = g.stack(*(g.param(f"experts.{e}.down_proj.weight", [8, 3]) for e in range(2)))
    scores, ids = g.router_topk(g.linear(x, g.param("mlp.gate.weight", [2, 8])), k=1, normalize=True)
    return g.moe_experts(x, scores, ids, g.stack(*parts), down, name="experts")


def test_experts_take_the_most_exact_of_their_parts_forms() -> None:
    graph = model(region(experts), ("layers.0.",))
    params = weights_of(graph)
    after, _ = run(graph, policy={"*.0.up_proj.*": "int8", "*.down_proj.*": "plain", "*experts*": "int4_g4"})
    node = next(n for n in after.regions["layer"].nodes if n.op.name == "moe_experts")
    assert [str(value.type.dtype) for value in node.inputs[3:]] == ["int8{row, scale f32}", "f32"]
    forms = {name: SCHEMES["int8"] for name in params if "gate_proj" in name or "up_proj" in name}
    np.testing.assert_allclose(meaning(after, params), meaning(graph, rounded(params, forms)), rtol=1e-5, atol=1e-5)


def stored_fp8(g: GraphBuilder, x: Any) -> Any:
    """Rows regrouped as in the models, two siblings, and one that is stored plain."""
    grouped = g.dequantize(g.param("q_proj.weight", [16, 8], FP8), dtype="float32", name="q")
    pieces = g.split(g.reshape(grouped, shape=(2, 8, 8)), sizes=(4, 4), axis=1)
    q = g.linear(x, g.concat(*(g.reshape(piece, shape=(8, 8)) for piece in pieces), axis=0), name="q_proj")
    k = g.linear(x, g.dequantize(g.param("k_proj.weight", [14, 8], FP8), dtype="float32"), name="k_proj")
    v = g.linear(x, g.param("v_proj.weight", [2, 8]), name="v_proj")
    return g.linear(g.add(q, g.concat(k, v, axis=-1)), g.dequantize(g.param("o.weight", [8, 16], FP8), dtype="float32"))


def test_stored_codes_are_kept_through_regrouping_and_packing() -> None:
    graph = model(region(stored_fp8))
    params = weights_of(graph)
    after, events = run(graph, keep=True)
    np.testing.assert_allclose(meaning(after, params), meaning(graph, params), rtol=1e-5, atol=1e-5)
    assert [str(n.inputs[1].type) for n in after.regions["layer"].nodes if n.op.name == "linear"] == [
        f"{FP8}[30, 8]",
        "f32[2, 8]",
        f"{FP8}[8, 16]",
    ]
    assert [event.kind for event in events] == ["hit", "refused", "hit"]
    lifted = run_pipeline(after, [LiftWeights()], Context(), properties=frozenset({"canonical"})).graph
    assert lifted.regions["layer"].weights is not None
    assert "dequantize" not in ops_of(lifted.regions["layer"].weights)


def misaligned(g: GraphBuilder, x: Any) -> Any:
    whole = g.dequantize(g.param("w.weight", [8, 8], FP8), dtype="float32", name="wide")
    first, second = g.split(whole, sizes=(3, 5), axis=0)
    return g.linear(x, g.concat(second, first, axis=0), name="out")


def test_codes_that_would_be_cut_are_dequantised_with_the_reason() -> None:
    graph = model(region(misaligned))
    params = weights_of(graph)
    after, events = run(graph, keep=True)
    assert consumers(after.regions["layer"]) == {"out": "f32"}
    (event,) = events
    assert event.kind == "refused" and "stored codes are dequantised: x fp8_e4m3{block 4x8" in event.reason
    assert "border at 3 of axis 0, which is inside a block" in event.reason
    np.testing.assert_array_equal(meaning(after, params), meaning(graph, params))
    again, events = run(graph, keep=True, policy="int8")
    assert consumers(again.regions["layer"]) == {"out": "int8{row, scale f32}"} and "dequantised" in events[0].reason


def test_it_runs_before_weights_are_lifted() -> None:
    with pytest.raises(CompileError, match="quantise"):
        run_pipeline(model(region(mixer)), [Canonicalise(), LiftWeights(), Quantise((("*", "int8"),))], Context())


def test_a_computed_weight_stays_as_it_is() -> None:
    g = GraphBuilder("computed")
    x = g.input("x", f32[4, 4])
    g.output("y", g.linear(x, g.silu(x)))
    graph = g.build()
    assert run(graph, policy="int8")[0] == graph


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "int8"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "int4"),
        ("model.layers.3.mlp.gate_proj.weight", "int8"),
        ("model.layers.3.mlp.gate.weight", "plain"),
        ("model.layers.3.mlp.shared_expert_gate.weight", "plain"),
        ("model.layers.3.linear_attn.in_proj_ba.weight", "plain"),
        ("model.layers.3.linear_attn.conv1d.weight", "plain"),
        ("model.layers.3.input_layernorm.weight", "plain"),
        ("model.embed_tokens.weight", "plain"),
        ("lm_head.weight", "fp8"),
    ],
)
def test_the_first_pattern_decides_and_protected_weights_must_be_named(name: str, scheme: str) -> None:
    policy = quantise_policy({"*.experts.*": "int4", "lm_head*": "fp8", "*": "int8"})
    assert scheme_of(policy, "", name) == scheme
    prefix = "model.layers.3."
    if name.startswith(prefix):
        assert scheme_of(policy, prefix, name.removeprefix(prefix)) == scheme


def test_a_pattern_may_speak_of_names_within_a_layer() -> None:
    policy = quantise_policy({"mlp.gate.weight": "int8", "self_attn.*": "int4"})
    assert scheme_of(policy, "model.layers.0.", "mlp.gate.weight") == "int8"
    assert scheme_of(policy, "model.layers.0.", "self_attn.o_proj.weight") == "int4"
    assert scheme_of(policy, "model.layers.0.", "mlp.up_proj.weight") == "plain"


def test_schemes_and_their_order() -> None:
    assert scheme_type("int8_g64") == QuantType(i8, (1, 64), bf16) and scheme_type("plain") is None
    forms = [scheme_type(name) for name in ("int4", "fp8", "int8", "int8_g64", "int4_g128")]
    assert most_exact(forms) == scheme_type("int8_g64")
    assert most_exact([*forms, None]) is None and most_exact([*forms, scheme_type("bf16")]) == bf16
    assert most_exact([forms[0], forms[4]]) == forms[0] and most_exact([forms[0], forms[1]]) == forms[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int5", "there is no scheme 'int5'; known are bf16, int8, int4, fp8, int8_gN and int4_gN"),
        ("int4_g31", "int4_g31 has groups of 31; expected an even number"),
        ({"*": 8}, r"has \('\*', 8\); expected a scheme"),
        ({"": "int8"}, "expected a scheme"),
        (8, "quantise is 8; expected a scheme"),
        (["int8"], "has 'int8'; expected a scheme"),
    ],
)
def test_bad_policies_are_refused_with_a_sentence(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantise_policy(value)


def test_the_configuration_checks_and_keeps_the_policy() -> None:
    assert CompileConfig(quantise="int8").policy == (("*", "int8"),)
    assert compile_config({"quantise": {"*experts*": "int4", "*": "int8"}}).policy == (("*experts*", "int4"), ("*", "int8"))
    assert CompileConfig().policy == ()
    with pytest.raises(ConfigError, match="no scheme 'int9'"):
        compile_config({"quantise": "int9"})


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    names = [("model.layers.0.", "mlp.up_proj.weight"), ("", "lm_head.weight")]
    check_matches(quantise_policy({"mlp.*": "int8", "model.*": "int8", "lm_*": "int8"}), names)
    with pytest.raises(ConfigError, match=r"'\*experts\*' matches no parameter of the model; .* for example model.layers.0"):
        check_matches(quantise_policy({"*experts*": "int8"}), names)
