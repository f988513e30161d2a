"""Quantised models from end to end: weights evaluated in place, kernels chosen, quality of the bundled model, kept FP8."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.golden_data import cases, compare, walk

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import CheckpointError, ConfigError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, f8_e4m3, f32
from deltaloom.ops.quantized import Quantize
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import SHARED
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.passes.quantise import Quantise
from deltaloom.passes.quantise_policy import SCHEMES
from deltaloom.runtime.model import Model
from deltaloom.runtime.quantization import logit_error, perplexity, weight_bytes, weight_errors
from deltaloom.runtime.weights import materialise

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tiny_next"
TARGETS = {"int8": 1.01, "fp8": 1.03, "int4": 1.15}
"""Perplexity at most, in units of that of float32."""
FP8 = QuantType(f8_e4m3, (4, 8), f32)


@cache
def tiny(scheme: str, backend: str = "numpy") -> Model:
    policy = {} if scheme == "float32" else scheme
    return deltaloom.load("tiny-next", backend=backend, dtype="float32", config=CompileConfig(threads=1, quantise=policy))


@cache
def text() -> list[int]:
    llm = deltaloom.LLM("tiny-next", config=CompileConfig(threads=1))
    return llm.tokenizer.encode((GOLDEN / "eval_text.txt").read_text(encoding="utf-8"))


class Stored:
    """Tensors in a dictionary."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Any:
        return self.tensors[name]


def joined(kind: str) -> Graph:
    """A linear or experts whose weight is made of pieces, some stored as FP8 codes."""
    g = GraphBuilder("joined")
    x = g.input("x", f32[1, 2, 16])
    if kind == "rows":
        parts = [g.param(f"{name}.weight", [rows, 16]) for name, rows in (("q", 12), ("k", 4), ("v", 7))]
        y = g.linear(x, g.concat(*parts, axis=0))
    elif kind == "experts":
        pairs = [g.concat(g.param(f"{e}.gate.weight", [6, 16]), g.param(f"{e}.up.weight", [6, 16]), axis=0) for e in range(3)]
        down = g.stack(*(g.param(f"{e}.down.weight", [16, 6]) for e in range(3)))
        weights, ids = g.router_topk(g.linear(x, g.param("mlp.gate.weight", [3, 16])), k=2, normalize=True)
        y = g.moe_experts(x, weights, ids, g.stack(*pairs), down)
    else:
        stored = [g.dequantize(g.param(f"{name}.weight", [8, 16], FP8), dtype="float32") for name in "abc"]
        first, second = g.split(stored[0], sizes=(4, 4), axis=0)
        y = g.linear(x, g.concat(second, stored[1], first, stored[2], axis=0))
    g.output("y", y)
    return g.build()


@pytest.mark.parametrize("kind", ["rows", "experts", "stored"])
@pytest.mark.parametrize("scheme", ["keep", "int8", "int4_g4", "fp8"])
def test_quantised_weights_evaluated_piece_by_piece_are_what_the_weight_graph_means(kind: str, scheme: str) -> None:
    quantise = Quantise(keep=True) if scheme == "keep" else Quantise((("*", scheme),))
    graph = run_pipeline(joined(kind), [*SHARED[:-1], quantise, SHARED[-1]], Context()).graph
    assert graph.weights is not None
    rng, params, tensors = np.random.default_rng(3), {}, {}
    for name, type_ in graph.weights.all_params().items():
        params[name] = tensors[name] = rng.standard_normal(type_.static_shape()).astype(np.float32)
        if isinstance(type_.dtype, QuantType):
            codes = params[name] = Quantize(str(type_.dtype)).reference(params[name])
            tensors |= {name: codes.data, name + "_scale_inv": codes.scale}
    want = interpret(graph.weights, {}, params.__getitem__, {}).outputs
    forms = set()
    for name, value in graph.weights.outputs:
        found = materialise(graph.weights, value, "", Stored(tensors), ())
        if isinstance(found, QuantizedArray):
            forms.add(str(found.form))
            assert found.type == value.type == want[name].type
            assert found.data.tobytes() == want[name].data.tobytes() and found.scale.tobytes() == want[name].scale.tobytes()
        else:
            np.testing.assert_array_equal(found, want[name])
    assert len(forms) == (0 if scheme == "keep" and kind != "stored" else 1)


def test_a_weight_that_cannot_be_quantised_is_named() -> None:
    graph = run_pipeline(joined("rows"), [*SHARED[:-1], Quantise((("*", "int8"),)), SHARED[-1]], Context()).graph
    assert graph.weights is not None
    tensors = {"layer." + n: np.ones(t.static_shape(), np.float32) for n, t in graph.weights.all_params().items()}
    tensors["layer.k.weight"][2, 3] = np.inf
    ((_, value),) = graph.weights.outputs
    with pytest.raises(CheckpointError, match=r"the weight 'layer\.k\.weight' cannot be quantised: 1 of 64 values are not finite"):
        materialise(graph.weights, value, "layer.", Stored(tensors), ())


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_every_quantised_weight_gets_a_kernel_that_reads_its_codes(backend: str) -> None:
    graph = tiny("int8", backend).main.driver.shared.graph
    quantised = [p for region in graph.regions.values() for p in region.params if isinstance(p.type.dtype, QuantType)]
    assert len(quantised) == 12
    programs = tiny("int8", backend).main.driver
    for variant in list(programs._programs):
        placed = programs.program(variant).graph
        for region in placed.regions.values():
            nodes = [n for n in region.nodes if any(isinstance(v.type.dtype, QuantType) for v in n.inputs)]
            assert nodes and all(n.placement and ".quantised_" in n.placement.kernel for n in nodes)


@pytest.mark.parametrize("scheme", TARGETS)
def test_perplexity_of_a_piece_of_text_stays_near_that_of_float32(scheme: str) -> None:
    ids = text()[:1500]
    assert perplexity(tiny(scheme), ids) <= TARGETS[scheme] * perplexity(tiny("float32"), ids)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", TARGETS)
def test_perplexity_of_the_whole_text_stays_near_that_of_float32(scheme: str) -> None:
    assert perplexity(tiny(scheme), text()) <= TARGETS[scheme] * perplexity(tiny("float32"), text())


def test_perplexity_is_that_of_scores() -> None:
    ids = text()[:40]
    llm = deltaloom.LLM("tiny-next", config=CompileConfig(threads=1))
    assert perplexity(tiny("float32"), ids) == pytest.approx(np.exp(-llm.score([ids[0]], ids[1:]).logprob / 39), rel=1e-4)
    halves = -llm.score([ids[0]], ids[1:20]).logprob - llm.score([ids[20]], ids[21:]).logprob
    assert perplexity(tiny("float32"), ids, window=20) == pytest.approx(np.exp(halves / 38), rel=1e-4)


@pytest.mark.parametrize("scheme", TARGETS)
def test_backends_agree_on_quantised_logits(scheme: str) -> None:
    error = logit_error(tiny(scheme, "torch"), tiny(scheme), text()[:60])
    assert error.rms < 1e-4 and error.agreement == 1.0 and abs(error.divergence) < 1e-6


@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bfloat16_weights_of_a_checkpoint_that_has_them_change_nothing(backend: str) -> None:
    """The bundled checkpoint is stored in bfloat16, and activations are not rounded."""
    narrow, plain = tiny("bf16", backend), tiny("float32")
    error = logit_error(narrow, plain, text()[:60])
    assert error.largest < 2e-4 and error.agreement == 1.0
    errors = list(weight_errors(narrow))
    assert len(errors) > 40 and {(e.rms, e.form) for e in errors} == {(0.0, "bf16")}
    assert weight_bytes(narrow) < 0.6 * weight_bytes(plain)  # the embedding and the norms stay


def test_int8_repeats_most_reference_generations() -> None:
    items = json.loads((GOLDEN / "reference_generations.json").read_text(encoding="utf-8"))["items"][:10]
    llm = deltaloom.LLM("tiny-next", dtype="float32", config=CompileConfig(threads=1, quantise="int8"))
    greedy = deltaloom.SamplingParams(max_tokens=64, temperature=0)
    made = [result.outputs[0].token_ids for result in llm.generate([item["prompt_ids"] for item in items], greedy)]
    assert sum(a == item["output_ids"] for a, item in zip(made, items, strict=True)) >= 8


def test_the_error_report_orders_schemes_and_counts_bytes() -> None:
    reference = tiny("float32")
    assert logit_error(reference, reference, text()[:20]).rms == 0 and not list(weight_errors(reference))
    errors = {scheme: {e.name: e for e in weight_errors(tiny(scheme))} for scheme in TARGETS}
    assert len(errors["int8"]) == 6 * 6 + 2 * 6
    for name, error in errors["int8"].items():
        assert 0 < error.rms < 0.01 and 0 < error.largest < 0.005 and error.form == str(SCHEMES["int8"])
        assert error.size < 0.3 * error.plain_size
        assert error.rms < errors["fp8"][name].rms < errors["int4"][name].rms < 0.15
        assert errors["int4"][name].size == error.plain_size // 4 * 9 // 16
    sizes = [weight_bytes(tiny(scheme)) for scheme in ("float32", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    saved = sum(error.plain_size - error.size for error in errors["int4"].values())
    assert sizes[0] - sizes[2] == saved
    divergences = [logit_error(tiny(scheme), reference, text()[:200]).divergence for scheme in ("int8", "fp8", "int4")]
    assert 0 < divergences[0] < divergences[1] < divergences[2] < 0.3


@pytest.mark.parametrize("backend", ["numpy", "torch", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", cases("next_fp8"), ids=str)
def test_kept_fp8_agrees_with_the_goldens(backend: str, case: Any) -> None:
    config = CompileConfig(keep_quantized=True, threads=1)
    model = deltaloom.load(case.folder, backend=backend, dtype="float32", config=config)
    forms = {str(e.form) for e in weight_errors(model)}
    assert forms == {"fp8_e4m3{block 128x128, scale f32}"} and all(e.kept for e in weight_errors(model))
    assert weight_bytes(model) < 0.6 * weight_bytes(deltaloom.load(case.folder, backend=backend, dtype="float32"))
    state = None
    for stage in walk(case):
        state = state or model.new_state(len(stage.token_ids))
        mask = None if stage.valid.all() else stage.valid
        out = model.forward(stage.token_ids, state=state, attention_mask=mask, output_hidden_states=True)
        assert out.logits is not None and out.hidden_states is not None
        compare(case, stage, logits=out.logits, hidden=out.hidden_states, state=state.arrays().__getitem__)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_inductor_runs_quantised_weights_without_compiling_more_often(scheme: str) -> None:
    ids = text()[:30]
    model = tiny(scheme, "inductor")
    assert logit_error(model, tiny(scheme), ids).rms < 1e-4
    state = model.forward([ids]).state
    for token in ids[:3]:
        model.forward([[token]], state=state)
    assert max(model.main.ctx.backends[0].compilations().values()) <= 2  # type: ignore[attr-defined]


def test_drafts_of_a_quantised_head_stay_near() -> None:
    """The MTP head is quantised by the same policy."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, 4, 192)).astype(np.float32)
    ids = np.array([[5, 9, 11, 40]])
    logits = []
    for scheme in ("float32", "int8"):
        head = tiny(scheme).mtp
        assert head is not None
        logits.append(head.forward(ids, hidden, np.arange(4)[None], head.new_state(1))["logits"])
    difference = np.abs(logits[0] - logits[1]).max()
    assert 0 < difference < 0.1 * np.abs(logits[0]).max()


@pytest.mark.parametrize("policy", [{"*.expert.*": "int8"}, {"*": "int8", "layers.9.*": "int4"}])
def test_a_pattern_that_matches_nothing_is_refused_at_load(policy: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="matches no parameter of the model"):
        deltaloom.load("tiny-next", config=CompileConfig(quantise=policy))


def test_layers_may_have_forms_of_their_own() -> None:
    policy = {"model.layers.0.*": "plain", "*.experts.*": "int4", "*.self_attn.*": "int8"}
    model = deltaloom.load("tiny-next", dtype="float32", config=CompileConfig(threads=1, quantise=policy))
    errors = list(weight_errors(model))
    assert not any(".layers.0." in e.name for e in errors)
    assert {e.form for e in errors if "experts" in e.name} == {str(SCHEMES["int4"])}
    assert {e.form for e in errors if "self_attn" in e.name} == {str(SCHEMES["int8"])}
    assert 0 < logit_error(model, tiny("float32"), text()[:100]).divergence < 0.1
