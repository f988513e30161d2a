"""The serving layout on small graphs: what it changes, what it keeps, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

import deltaloom.ops  # noqa: F401
from deltaloom.backends import backend
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Op
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.registry import ops
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import TensorType, bool_, f32
from deltaloom.passes.assign import Assign
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.passes.serving_layout import ServingLayout, ServingVariant
from deltaloom.passes.specialise import Specialise

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past", low=0)


def mixer() -> Graph:
    """A region with a convolution and one with attention, called one after the other; the last position goes out too."""
    linear = GraphBuilder("linear")
    x, valid = linear.input("x", f32[BATCH, SEQ, 4]), linear.input("valid", bool_[BATCH, PAST + SEQ])
    conv = linear.state("conv", f32[BATCH, 4, 2])
    y, new_conv = linear.causal_conv1d(linear.mask_padding(x, valid), linear.param("conv", [4, 1, 3]), conv, name="y")
    linear.update(conv=new_conv)
    linear.output("y", y)

    attention = GraphBuilder("attention")
    x, valid = attention.input("x", f32[BATCH, SEQ, 4]), attention.input("valid", bool_[BATCH, PAST + SEQ])
    key = attention.state("key", f32[BATCH, 1, PAST, 2], append_axis=2)
    value = attention.state("value", f32[BATCH, 1, PAST, 2], append_axis=2)
    q = attention.unflatten(x, sizes=(2, 2))
    k, v = (attention.unflatten(part, sizes=(1, 2)) for part in attention.split(x, sizes=(2, 2)))
    out, new_key, new_value = attention.attention(q, k, v, key, value, valid, scale=1.0, name="attention")
    attention.update(key=new_key, value=new_value)
    attention.output("y", attention.flatten(out, axes=2))

    g = GraphBuilder("mixer")
    x, valid = g.input("x", f32[BATCH, SEQ, 4]), g.input("valid", bool_[BATCH, PAST + SEQ])
    h = g.call(linear.build(), x, valid, prefix="layers.0.")
    y = g.call(attention.build(), h, valid, prefix="layers.1.")
    g.output("y", y)
    g.output("last", g.silu(g.take_last(y), name="last"))
    return g.build()


def laid_out(each: int | None = None) -> Graph:
    return run_pipeline(mixer(), [ServingLayout(each, block_size=2)], Context()).graph


def types(graph: Graph) -> dict[str, str]:
    return {value.name: str(value.type) for value in graph.inputs}


def test_calls_pass_what_their_regions_read() -> None:
    graph = laid_out()
    assert types(graph) == {
        "x": "f32[1, tokens, 4]",
        "block_tables": "i32[seqs, max_blocks]",
        "context_lengths": "i32[seqs]",
        "read_slots": "i32[seqs]",
        "write_slots": "i32[tokens]",
        "query_starts": "i32[seqs + 1]",
        "logit_rows": "i32[rows]",
    }
    linear, attention = graph.region("linear"), graph.region("attention")
    assert list(types(linear)) == ["x", "read_slots", "write_slots", "query_starts"]
    assert list(types(attention)) == ["x", "block_tables", "context_lengths", "query_starts"]
    assert [node.op.name for node in linear.nodes] == ["packed_causal_conv1d"]
    assert [str(state.value.type) for state in linear.states] == ["f32[slots, 4, 2]"]
    assert [str(state.value.type) for state in attention.states] == ["f32[blocks, 1, 2, 2]"] * 2
    assert all(state.append_axis is None for state in attention.states)
    assert str(graph.output("last").type) == "f32[1, rows, 4]" and str(graph.output("y").type) == "f32[1, tokens, 4]"


def test_as_many_tokens_for_each_need_neither_starts_nor_rows() -> None:
    decode, verify = laid_out(1), laid_out(3)
    for graph, tokens in ((decode, "seqs"), (verify, "3*seqs")):
        assert types(graph) == {
            "x": f"f32[1, {tokens}, 4]",
            "block_tables": "i32[seqs, max_blocks]",
            "context_lengths": "i32[seqs]",
            "read_slots": "i32[seqs]",
            "write_slots": f"i32[{tokens}]",
        }
        assert str(graph.output("last").type) == f"f32[1, {tokens}, 4]"
        assert "take_rows" not in [node.op.name for node in graph.nodes]


@pytest.mark.parametrize("each", [None, 1, 3])
def test_the_layout_survives_its_text(each: int | None) -> None:
    graph = laid_out(each)
    assert parse_graph(print_graph(graph)) == graph


def test_the_pass_leaves_its_input_and_the_attributes_alone() -> None:
    before = mixer()
    graph = run_pipeline(before, [ServingLayout()], Context()).graph
    assert before == mixer()
    (node,) = [n for n in graph.region("attention").nodes if n.op.name == "paged_attention"]
    assert node.op.attributes() == {"scale": 1.0} and node.name == "attention"


def test_interpreted_it_means_what_each_sequence_means_alone() -> None:
    """Two sequences of 3 and 2 tokens after 0 and 1 others, by the references alone."""
    rng = np.random.default_rng(0)
    x, before = rng.standard_normal((1, 5, 4), np.float32), rng.standard_normal((1, 1, 4), np.float32)
    weight = rng.standard_normal((4, 1, 3), np.float32)
    none = {"layers.0.conv": np.zeros((1, 4, 2), np.float32)}
    none.update({f"layers.1.{name}": np.zeros((1, 1, 0, 2), np.float32) for name in ("key", "value")})

    def alone(tokens: np.ndarray) -> np.ndarray:
        given = {"x": tokens, "valid": np.ones(tokens.shape[:2], bool)}
        found: np.ndarray = interpret(mixer(), given, lambda name: weight, none).outputs["y"]
        return found

    pools = {"layers.0.conv": np.full((4, 4, 2), np.nan, np.float32)}
    pools.update({f"layers.1.{name}": np.full((6, 1, 2, 2), np.nan, np.float32) for name in ("key", "value")})

    def step(tokens: np.ndarray, layout: dict[str, list[int] | list[list[int]]]) -> dict[str, np.ndarray]:
        given = {"x": tokens, **{name: np.asarray(numbers, np.int32) for name, numbers in layout.items()}}
        results = interpret(laid_out(), given, lambda name: weight, pools)
        pools.update(results.states)
        return results.outputs

    first = {"block_tables": [[4]], "context_lengths": [0], "read_slots": [-1], "write_slots": [2]}
    step(before, {**first, "query_starts": [0, 1], "logit_rows": [0]})
    both = {"block_tables": [[1, 3], [4, 2]], "context_lengths": [0, 1], "read_slots": [-1, 2], "write_slots": [-1, -1, 1, -1, 3]}
    out = step(x, {**both, "query_starts": [0, 3, 5], "logit_rows": [4, 2]})
    want = np.concatenate([alone(x[:, :3]), alone(np.concatenate([before, x[:, 3:]], axis=1))[:, 1:]], axis=1)
    np.testing.assert_allclose(out["y"], want, rtol=1e-5)
    np.testing.assert_allclose(out["last"], (want / (1 + np.exp(-want)))[:, [4, 2]], rtol=1e-5)


def fused() -> Graph:
    """One fused op of each kind that has state."""
    g = GraphBuilder("fused")
    projected = g.input("projected", f32[BATCH, SEQ, 22])
    conv, delta = g.state("conv", f32[BATCH, 12, 3]), g.state("delta", f32[BATCH, 2, 3, 3])
    shapes = {"conv_weight": [12, 1, 4], "a_log": [2], "dt_bias": [2], "norm": [3]}
    weights = [g.param(name, shape) for name, shape in shapes.items()]
    sizes = {"key_heads": 1, "value_heads": 2, "key_dim": 3, "value_dim": 3, "scale": 0.5, "eps": 1e-3, "l2_eps": 1e-4}
    out, new_conv, new_delta = g.gated_delta_net(projected, *weights, conv, delta, **sizes, name="net")
    key, value = (g.state(name, f32[BATCH, 1, PAST, 3], append_axis=2) for name in ("key", "value"))
    q, k = g.unflatten(out, sizes=(2, 3)), g.unflatten(g.split(out, sizes=(3, 3))[0], sizes=(1, 3))
    gated, new_key, new_value = g.gated_attention(q, k, k, out, key, value, scale=0.5, name="attention")
    g.update(conv=new_conv, delta=new_delta, key=new_key, value=new_value)
    g.output("y", gated)
    return g.build()


@pytest.mark.parametrize("each", [None, 1, 3])
def test_fused_ops_have_serving_forms_with_kernels(each: int | None) -> None:
    ctx = Context(backends=(backend("numpy"),))
    steps = [Canonicalise(), LiftWeights(), ServingLayout(each), Assign()]
    nodes = {node.op.name: node for node in run_pipeline(fused(), steps, ctx).graph.nodes}
    assert nodes["gated_paged_attention"].op.attributes() == {"scale": 0.5}
    if each is None:  # the kernel of the delta net is for as many tokens each, so the node was taken apart
        assert "packed_gated_delta_rule" in nodes and "packed_causal_conv1d" in nodes
    else:
        assert nodes["packed_gated_delta_net"].op.attributes()["l2_eps"] == 1e-4
        assert len(nodes) == 4
    assert all("reference" not in nodes[name].placement.kernel for name in nodes if name.startswith("packed"))  # type: ignore[union-attr]


def test_specialised_graphs_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(CompileError, match="has no symbol seq; lay it out for serving before sizes are specialised"):
        run_pipeline(mixer(), [Specialise(1), ServingLayout()], Context())
    with pytest.raises(CompileError, match="block_size is 0"):
        run_pipeline(mixer(), [ServingLayout(block_size=0)], Context())
    with pytest.raises(CompileError, match="tokens_each is 0"):
        run_pipeline(mixer(), [ServingLayout(0)], Context())


class Running(Op):
    """A sum with a state, without a serving form."""

    name = "test.running"
    outputs = ("out", "new_state")
    updates = {"state": 1}

    def infer(self, x: TensorType, state: TensorType) -> tuple[TensorType, TensorType]:
        return x, state


def test_an_op_with_state_and_without_serving_form_is_refused_by_name() -> None:
    ops.add(Running)
    try:
        g = GraphBuilder("running")
        state = g.state("total", f32[BATCH, 4])
        out, new = getattr(g, "test.running")(g.input("x", f32[BATCH, SEQ, 4]), state, name="sum")
        g.update(total=new)
        g.output("y", out)
        with pytest.raises(CompileError, match="%sum = test.running keeps a state and has no serving form"):
            run_pipeline(g.build(), [ServingLayout()], Context())
    finally:
        ops.remove("test.running")


def test_variants_say_what_they_are() -> None:
    assert [str(ServingVariant(kind, ())) for kind in ("mixed", "decode")] == ["mixed", "decode"]
    verify = ServingVariant("verify", ("logits",), drafts=3)
    assert str(verify) == "verify3" and verify.tokens_each == 4
    with pytest.raises(CompileError, match="a verify program with 0 drafts: expected at least 1"):
        ServingVariant("verify", ())
    with pytest.raises(CompileError, match="a decode program with 2 drafts: expected 0"):
        ServingVariant("decode", (), drafts=2)
    with pytest.raises(CompileError, match="no serving program 'prefill'; there are mixed, decode, verify"):
        ServingVariant("prefill", ())  # type: ignore[arg-type]
