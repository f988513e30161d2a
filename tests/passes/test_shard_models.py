"""Sharded, packed and fused models on the lock-step simulator compute what one rank computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from goldens.golden_data import FOLDER, Case, case_named, cases, compare, mtp_rounds, walk
from hypothesis import given
from hypothesis import strategies as st
from sharded_models import Pair, Random, open_model, optimised, stream

from deltaloom.graph.errors import ConfigError, GraphError
from deltaloom.graph.ir import Graph
from deltaloom.graph.registry import ops
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import f32, f64
from deltaloom.models.build import build_graph
from deltaloom.models.bundled import model_folder
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.plans import legal, shard_pass
from deltaloom.passes.canonicalise import Canonicalise
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pipeline import Context, Pass, run_pipeline
from deltaloom.runtime.lockstep import LockStep
from deltaloom.testing.measure import assert_close

TIGHT = 1e-11  # relative to the largest element; the models' float64 sums have a few hundred terms, in another order


def agree(wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Both have the same names, and in float64 the same numbers but for the order of sums."""
    assert set(found) == set(wanted)
    for name, truth in wanted.items():
        assert found[name].shape == truth.shape, name
        scale = np.abs(truth).max(initial=1e-3)
        assert np.abs(found[name] - truth).max(initial=0.0) <= TIGHT * scale, name


NAMED = [("next_base", "chunked"), ("next_base", "batch2"), ("qwen3_moe", "t37")]
OTHERS = ("next_dense_mix", "next_fused_experts", "next_heads_equal", "next_leftpad", "next_sparse_step2", "qwen3_dense")
SHORTEST = [(name, cases(name)[0].name) for name in OTHERS]


def agree_on_case(case: Case, tp: int) -> None:
    """Every stage of a golden case, its states carried, against one rank and against the golden outputs."""
    config, graphs, source = open_model(case.folder, f64)
    pair = None
    for stage in walk(case):
        pair = pair or Pair(config, graphs.main, source, tp, len(stage.token_ids))
        wanted, found = pair.step({"token_ids": stage.token_ids, "positions": stage.positions, "valid": stage.valid})
        agree(wanted, found)
        states = {name.removeprefix("state "): array for name, array in found.items()}
        compare(case, stage, logits=found["logits"], final_norm=found["final_norm"], state=states.__getitem__)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("variant", "name"), [*NAMED, *SHORTEST])
def test_golden_cases_agree(variant: str, name: str, tp: int) -> None:
    agree_on_case(case_named(variant, name), tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_the_mtp_head_agrees(tp: int) -> None:
    case = case_named("next_mtp", "t7")
    config, graphs, source = open_model(case.folder, f64)
    assert graphs.mtp is not None
    pair, seen = Pair(config, graphs.mtp, source, tp, 1), 0
    for turn in mtp_rounds(case):
        seen += turn.next_ids.shape[1]
        valid = np.ones((1, seen), bool)
        rows = {"next_ids": turn.next_ids, "hidden": turn.target_hidden, "positions": turn.positions, "valid": valid}
        wanted, found = pair.step(rows)
        agree(wanted, found)
        np.testing.assert_allclose(found["logits"], turn.logits, atol=case.atol, rtol=case.rtol)
        states, hidden = (pair.states, pair.many_states), found["last_hidden"]
        for number, draft in enumerate(turn.drafts, start=1):
            given = {"next_ids": draft.next_ids, "hidden": hidden, "positions": draft.positions}
            wanted, found = pair.step({**given, "valid": np.ones((1, seen + number), bool)})
            agree(wanted, found)
            np.testing.assert_allclose(found["logits"][0, 0], draft.logits, atol=case.atol, rtol=case.rtol)
            hidden = found["last_hidden"]
        pair.states, pair.many_states = states


@pytest.mark.parametrize("tp", [2, 4])
def test_tiny_next_agrees(tp: int) -> None:
    """Prefill, chunk and two tokens, then the MTP head on what came of it."""
    config, graphs, source = open_model(model_folder("tiny-next"), f64)
    ids = np.random.default_rng(tp).integers(0, config.vocab_size, (2, 14))
    main, final = Pair(config, graphs.main, source, tp, 2), []
    for inputs in stream(ids, (9, 3, 1, 1)):
        wanted, found = main.step(inputs)
        agree(wanted, found)
        final.append(found["final_norm"])
    assert graphs.mtp is not None
    mtp, hidden, past = Pair(config, graphs.mtp, source, tp, 2), np.concatenate(final, axis=1), 0
    for count in (12, 1):
        rows = slice(past, past + count)
        positions = np.broadcast_to(np.arange(past, past + count), (2, count))
        past += count
        inputs = {"next_ids": ids[:, 1:][:, rows], "hidden": hidden[:, rows], "positions": positions}
        agree(*mtp.step({**inputs, "valid": np.ones((2, past), bool)}))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("variant", ["next_base", "qwen3_moe"])
def test_float32_is_as_close_as_one_rank(variant: str, tp: int) -> None:
    config, exact, source = open_model(FOLDER / variant, f64)
    _, graphs, _ = open_model(FOLDER / variant, f32)
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (2, 11))
    truth, pair = Pair(config, exact.main, source, tp, 2), Pair(config, graphs.main, source, tp, 2)
    for inputs in stream(ids, (7, 3, 1)):
        right, _ = truth.step(inputs)
        single, sharded = pair.step(inputs)
        for name in right:
            assert_close(f"{name} on {tp} ranks", sharded[name], right[name], single[name])


def test_fused_values_keep_what_is_known_of_them() -> None:
    """A value that a later pass puts in the place of a divided one says the same of itself."""
    config, graphs, _ = open_model(FOLDER / "next_base", f32)
    body = optimised(graphs.main, shard_pass(config, {"tp": 4})).regions["linear_layer"]
    text = {node.op.name: print_graph(replace(body, nodes=(node,), outputs=(), updates=())) for node in body.nodes}
    assert "{tp: partial} = shared_moe(" in text["shared_moe"] and "{tp: 1 (16/2|16/2|32/4)}" in text["gated_delta_net"]


def only_sharded(graph: Graph, shard: Pass) -> Graph:
    return run_pipeline(graph, [Canonicalise(), shard, LiftWeights()], Context()).graph


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("variant", ["next_base", "qwen3_moe"])
def test_types_say_how_values_are_divided(variant: str, tp: int) -> None:
    """Put together as its type says, every value of the sharded graph is the value of that name on one rank."""
    config, graphs, source = open_model(FOLDER / variant, f64)
    pair = Pair(config, graphs.main, source, tp, 1, only_sharded)
    (inputs,) = stream(np.random.default_rng(1).integers(0, config.vocab_size, (1, 5)), (5,))
    wanted, found = pair.values(inputs)
    assert len(wanted) > 100
    agree(wanted, {name: found[name] for name in wanted})
    texts = {v.sharding for region in pair.sharded.regions.values() for node in region.nodes for v in node.outputs}
    assert {"tp: partial", "tp: 2", ""} <= texts


GEOMETRY = {
    "model_type": "qwen3_next", "vocab_size": 24, "hidden_size": 12, "num_hidden_layers": 2, "full_attention_interval": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
    "linear_conv_kernel_dim": 3, "decoder_sparse_step": 1, "norm_topk_prob": True, "tie_word_embeddings": False,
    "intermediate_size": 12,
}  # fmt: skip


def drawn_config(data: st.DataObject, tp: int = 1) -> ModelConfig:
    """A small config; with ``tp``, one whose heads and widths that many ranks divide."""
    number = st.integers
    pairs = [(few, each) for few in range(1, 5) for each in range(1, 5)]
    fitting = [(few, each) for few, each in pairs if few * each % tp == 0 and (few % tp == 0 or tp % few == 0)]
    kv, queries = data.draw(st.sampled_from(fitting), "KV heads, queries of each")
    keys, values = data.draw(st.sampled_from(fitting), "key heads, values of each")
    return read_config({
        **GEOMETRY,
        "vocab_size": data.draw(st.sampled_from([24, 25]), "vocabulary"),
        "num_key_value_heads": kv, "num_attention_heads": kv * queries,
        "linear_num_key_heads": keys, "linear_num_value_heads": keys * values,
        "head_dim": data.draw(st.sampled_from([4, 8]), "head size"),
        "linear_key_head_dim": data.draw(number(1, 3), "dk"), "linear_value_head_dim": data.draw(number(1, 3), "dv"),
        "num_experts": data.draw(number(2, 4), "experts"), "num_experts_per_tok": 2,
        "moe_intermediate_size": data.draw(st.sampled_from([4, 6, 12] if tp == 1 else [12]), "expert width"),
        "shared_expert_intermediate_size": data.draw(st.sampled_from([6, 12] if tp == 1 else [12]), "shared width"),
        "attention_bias": data.draw(st.booleans(), "bias"), "tie_word_embeddings": data.draw(st.booleans(), "tied"),
        "mlp_only_layers": data.draw(st.sampled_from([[], [1]]), "dense layers"),
    })  # fmt: skip


@given(data=st.data())
def test_any_geometry_agrees_or_is_refused(data: st.DataObject) -> None:
    config, tp = drawn_config(data), data.draw(st.sampled_from([2, 3, 4]), "tp")
    if refusals := legal(config, {"tp": tp}).refusals:
        with pytest.raises(ConfigError, match="does not fit this model"):
            shard_pass(config, {"tp": tp})
        assert all(f"tp = {tp}" in reason for reason in refusals)
        return
    agree_on_config(config, tp)


@given(data=st.data(), tp=st.sampled_from([2, 3, 4]))
def test_legal_geometries_agree(data: st.DataObject, tp: int) -> None:
    config = drawn_config(data, tp)
    assert not legal(config, {"tp": tp}).refusals
    agree_on_config(config, tp)


def agree_on_config(config: ModelConfig, tp: int) -> None:
    graphs = build_graph(config, dtype=f64)
    pair = Pair(config, graphs.main, Random(graphs), tp, 2)
    for inputs in stream(np.random.default_rng(0).integers(0, config.vocab_size, (2, 6)), (4, 1, 1)):
        agree(*pair.step(inputs))


WRONG = {
    "moe_experts": "b s h!, b s k!, b s k!, e! (i 2) h!, e! h! i -> b s h!",
    "attention": "b s! (r h) d!, b s! h d!, b s! h v, b h past! d!, b h past! v, b all! -> b s! (r h) v, b h all! d!, b h all! v",
    "linear": "+... i, o i, o -> ... o",
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_string_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config({
        **GEOMETRY, "num_key_value_heads": 2, "num_attention_heads": 4, "linear_num_key_heads": 2, "head_dim": 8,
        "linear_num_value_heads": 2, "linear_key_head_dim": 2, "linear_value_head_dim": 2, "num_experts": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4, "attention_bias": True,
    })  # fmt: skip
    agree_on_config(config, 2)
    monkeypatch.setattr(ops.get(name), "sharding", WRONG[name])
    with pytest.raises(AssertionError):
        agree_on_config(config, 2)


def test_ranks_that_differ_are_noticed() -> None:
    """An output that the ranks should have in common is compared, not taken from the first."""
    config, graphs, source = open_model(FOLDER / "next_base", f64)
    pair = Pair(config, graphs.main, source, 2, 1)
    (inputs,) = stream(np.array([[1, 2]]), (2,))

    class Drifting:
        reads = 0

        def read(self, name: str) -> Any:
            self.reads += name == "model.norm.weight"
            return source.read(name) + np.float32(0.1 if name == "model.norm.weight" and self.reads == 2 else 0)

    LockStep(pair.sharded, {"tp": 2}, source).run(inputs, pair.many_states)
    with pytest.raises(GraphError, match="is not the same on rank 1 as on rank 0"):
        LockStep(pair.sharded, {"tp": 2}, Drifting()).run(inputs, pair.many_states)
