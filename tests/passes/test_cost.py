"""The work of a graph: sums over bodies and calls, rules that agree with counts made by hand, and sizes that are missing."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import Dim, substitute, symbol
from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Call, Graph
from deltaloom.graph.types import bf16, f32, i32
from deltaloom.ops.attention import Attention
from deltaloom.ops.fused_attention import GatedAttention
from deltaloom.ops.fused_moe import SharedMoE
from deltaloom.ops.moe import MoEExperts
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.cost import Work, graph_work, node_work

CONFIG_80B = Path(__file__).resolve().parents[1] / "models" / "config_80b.json"
B, P, S = symbol("batch"), symbol("past", 0), symbol("seq")


@pytest.fixture(scope="module")
def tiny() -> Graph:
    return deltaloom.build_graph("tiny-next").main


def number(dim: Dim, sizes: dict[str, int]) -> int:
    found = substitute(dim, sizes)
    assert isinstance(found, int)
    return found


@given(sizes=st.fixed_dictionaries({"batch": st.integers(1, 5), "past": st.integers(0, 300), "seq": st.integers(1, 300)}))
def test_the_total_is_the_sum_over_every_layer(tiny: Graph, sizes: dict[str, int]) -> None:
    """Layer by layer and from costs as expressions; only the experts' bytes have no expression."""
    flops = moved = 0
    for instance in tiny.instances():
        for node in instance.graph.nodes:
            if isinstance(node.op, Call):
                continue
            cost = node.op.cost(*(value.type for value in node.inputs))
            flops += number(cost.flops, sizes)
            moved += node_work(node, sizes).bytes if node.op.name == "moe_experts" else number(cost.bytes, sizes)
    assert graph_work(tiny, sizes).total == Work(flops, moved)


def test_bodies_count_as_often_as_they_run(tiny: Graph) -> None:
    found = graph_work(tiny, {"batch": 1, "past": 10, "seq": 1})
    assert found.calls == {"qwen3_next": 1, "linear_layer": 6, "attention_layer": 2}
    assert found.total == found.body("qwen3_next") + found.body("linear_layer") * 6 + found.body("attention_layer") * 2


def test_a_decode_step_of_the_80b_reads_what_its_sizes_say() -> None:
    """Active weights by hand, in bfloat16; the state is read and written in float32."""
    graph = deltaloom.build_graph(CONFIG_80B, dtype="bfloat16").main
    compiled = deltaloom.compile(graph, CompileConfig(backends=("torch",), dtype="bfloat16"))
    program = compiled.program("decode", outputs=("last_logits",))
    hidden, layers = 2048, 48
    mixer = 36 * hidden * (12288 + 64 + 4096) + 12 * hidden * (8192 + 1024 + 4096)
    experts = layers * hidden * (512 + 1 + 3 * 512 * 11)
    weights = 2 * (mixer + experts + hidden * 151936)
    state = 36 * 2 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    total = graph_work(program.graph, {"batch": 1, "past": 1000}).total
    assert total.bytes == pytest.approx(weights + state + 1000 * 24576, rel=0.01)
    assert total.flops == pytest.approx(weights + 36 * 7 * 32 * 128 * 128 + 12 * 4 * 16 * 256 * 1000, rel=0.01)


@given(batch=st.integers(1, 3), past=st.integers(0, 9), seq=st.integers(1, 9))
def test_attention_counts_the_pairs_that_see_each_other(batch: int, past: int, seq: int) -> None:
    heads, width = 4, 8
    seen = np.tril(np.ones((seq, past + seq)), past).sum()
    q, k = f32[batch, seq, heads, width], f32[batch, seq, 2, width]
    cache = f32[batch, 2, past, width]
    cost = Attention(scale=1.0).cost(q, k, k, cache, cache)
    assert cost.flops == batch * heads * seen * (2 * width + 2 * width + 6)
    new = 2 * batch * seq * 2 * width * 4
    assert cost.bytes == 2 * batch * seq * heads * width * 4 + 2 * batch * 2 * past * width * 4 + 2 * new


def test_a_fused_op_moves_what_enters_and_leaves_it() -> None:
    """The gate is read besides what attention moves; the cache is read once and not written again."""
    q, k, cache, op = f32[1, 1, 4, 8], f32[1, 1, 2, 8], f32[1, 2, 100, 8], GatedAttention(scale=1.0)
    inner, outer = Attention(scale=1.0).cost(q, k, k, cache, cache), op.cost(q, k, k, f32[1, 1, 32], cache, cache)
    assert outer.bytes == inner.bytes + 32 * 4  # type: ignore[operator]
    q, k, cache = f32[B, S, 4, 8], f32[B, S, 2, 8], f32[B, 2, P, 8]
    symbolic = op.cost(q, k, k, f32[B, S, 32], cache, cache)
    assert number(symbolic.bytes, {"batch": 1, "seq": 1, "past": 100}) == outer.bytes
    assert number(symbolic.flops, {"batch": 1, "seq": 1, "past": 100}) == outer.flops


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 5000])
def test_experts_are_read_as_even_routing_reaches_them(tokens: int) -> None:
    experts, chosen, hidden, inner = 64, 8, 32, 16
    rng = np.random.default_rng(tokens)
    drawn = [len({e for _ in range(tokens) for e in rng.permutation(experts)[:chosen]}) for _ in range(200 if tokens < 100 else 2)]
    x, some, ids = f32[1, tokens, hidden], f32[1, tokens, chosen], i32[1, tokens, chosen]
    stacks = f32[experts, 2 * inner, hidden], f32[experts, hidden, inner]
    plain = MoEExperts().cost(x, some, ids, *stacks)
    around = 4 * (2 * tokens * hidden + 2 * tokens * chosen)
    one = 3 * hidden * inner * 4
    assert (plain.bytes - around) / one == pytest.approx(np.mean(drawn), rel=0.02)  # type: ignore[operator]
    if tokens == 1:
        assert plain.bytes == around + chosen * one
    shared = SharedMoE().cost(x, some, ids, f32[1, tokens, 1], *stacks, f32[2 * inner, hidden], f32[hidden, inner])
    assert shared.bytes == plain.bytes + one + 4 * tokens  # type: ignore[operator]


def test_of_unknown_many_tokens_all_experts_count() -> None:
    cost = MoEExperts().cost(bf16[B, S, 8], bf16[B, S, 2], i32[B, S, 2], bf16[4, 6, 8], bf16[4, 8, 3])
    assert number(cost.bytes, {"batch": 1, "seq": 1}) == 2 * (8 + 2 + 8) + 8 + 2 * 4 * (48 + 24)


def test_views_cost_nothing() -> None:
    g = GraphBuilder("views")
    x = g.input("x", f32[B, S, 12])
    a, b = g.split(x, sizes=(4, 8), axis=-1)
    g.output("a", g.take_last(g.flatten(g.unflatten(a, sizes=(2, 2)), axes=2)))
    g.output("b", b)
    assert graph_work(g.build(), {"batch": 2, "seq": 3}).total == Work(0, 0)


def test_missing_and_impossible_sizes_are_refused(tiny: Graph) -> None:
    sentence = "graph 'qwen3_next' has the size seq, for which no number is given; given are batch 1, past 3"
    with pytest.raises(GraphError, match=re.escape(sentence)):
        graph_work(tiny, {"batch": 1, "past": 3})
    with pytest.raises(GraphError, match="batch is 0, expected 1 to any"):
        graph_work(tiny, {"batch": 0, "past": 3, "seq": 1})
