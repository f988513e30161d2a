"""The layer graphs, run by the reference interpreter in float64, against the outputs of the library (float32)."""

from functools import cache

import numpy as np
import pytest
from goldens.golden_data import Array, Case, Round, case_named, cases, close, compare, mtp_rounds, walk
from goldens.reference_model import ReferenceModel, States

from deltaloom.graph.interpret import Results
from deltaloom.graph.types import bf16

DEVIATION = 4e-4  # float64 is at most 2.1e-4 from the oracle's float32; a mistake in the model moves outputs by 5e-3 or more


@cache
def model_of(variant: str) -> ReferenceModel:
    return ReferenceModel(cases(variant)[0].folder)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_stage_agrees(case: Case) -> None:
    model = model_of(case.variant)
    main, states = model.graphs.main, None
    for stage in walk(case):
        states = states or model.start(main, len(stage.token_ids))
        inputs = {"token_ids": stage.token_ids, "positions": stage.positions, "valid": stage.valid}
        results = model.run(main, inputs, states)
        states, outputs = results.states, results.outputs
        hidden = np.stack([outputs[f"hidden.{number}"] for number in range(len(stage.hidden))])
        logits, last = outputs["logits"], outputs["last_logits"]
        found = compare(case, stage, logits=logits, hidden=hidden, final_norm=outputs["final_norm"], state=states.__getitem__)
        assert max(found.values()) < DEVIATION, found
        np.testing.assert_allclose(last, logits[:, -1:], atol=1e-12)
        real = stage.real
        np.testing.assert_array_equal(logits[real].argmax(-1), stage.logits[real].argmax(-1))


def test_caches_are_in_the_golden_data() -> None:
    """The comparison above would pass in silence if no stage had states."""
    kinds = {name.rpartition(".")[2] for stage in walk(case_named("next_base", "t3")) for name in stage.states}
    assert kinds == {"conv", "delta", "key", "value"}


DETAILS = {
    "input_layernorm": "input_layernorm",
    "gdn_norm_in": "linear_attn.delta_rule",
    "gdn_norm": "linear_attn.norm",
    "post_attention_layernorm": "post_attention_layernorm",
    "router_logits": "mlp.gate",
    "router_topk_weights": "mlp.router.weights",
    "router_topk_index": "mlp.router.ids",
    "mlp": "mlp.mixture",
}


def test_details_inside_the_layers_agree() -> None:
    case = case_named("next_base", "detail")
    model = model_of(case.variant)
    (stage,) = walk(case)
    seen: dict[str, Array] = {}
    inputs = {"token_ids": stage.token_ids, "positions": stage.positions, "valid": stage.valid}
    model.run(model.graphs.main, inputs, model.start(model.graphs.main, 1), observe=seen.__setitem__)
    compared = set()
    for name, expected in stage.details.items():
        layer, _, detail = name.partition(".")
        mixer = "self_attn.o_proj" if (int(layer) + 1) % 4 == 0 else "linear_attn.out_proj"
        value = {**DETAILS, "mixer": mixer}.get(detail)
        if value:
            actual = seen[f"model.layers.{layer}.{value}"].reshape(expected.shape)
            assert close(case, name, actual, expected) < DEVIATION, name
            compared.add((layer, detail))
    assert len(compared) == 6 * 9 + 2 * 7


def test_flat_projections_hold_the_grouped_rows() -> None:
    """The regrouped projections give, channel by channel, what the stored ones give."""
    case = case_named("next_base", "detail")
    model, (stage,) = model_of(case.variant), walk(case)
    config = model.config
    seen: dict[str, Array] = {}
    inputs = {"token_ids": stage.token_ids, "positions": stage.positions, "valid": stage.valid}
    model.run(model.graphs.main, inputs, model.start(model.graphs.main, 1), observe=seen.__setitem__)
    keys, dk = config.linear_num_key_heads, config.linear_key_head_dim
    dv = config.linear_value_head_dim * config.linear_num_value_heads // keys
    for layer in (0, 1, 2, 4, 5, 6):
        stored = stage.details[f"{layer}.in_proj_qkvz"].reshape(1, 9, keys, 2 * dk + 2 * dv)
        pieces = np.split(stored, np.cumsum([dk, dk, dv]), axis=-1)
        flat = np.concatenate([piece.reshape(1, 9, -1) for piece in pieces], axis=-1)
        close(case, "qkvz", seen[f"model.layers.{layer}.linear_attn.qkvz"], flat)
        stored = stage.details[f"{layer}.in_proj_ba"].reshape(1, 9, keys, 2, -1)
        flat = np.concatenate([stored[:, :, :, part].reshape(1, 9, -1) for part in (0, 1)], axis=-1)
        close(case, "ba", seen[f"model.layers.{layer}.linear_attn.ba"], flat)


@pytest.mark.parametrize("case", cases("next_mtp"), ids=str)
def test_mtp_rounds_agree(case: Case) -> None:
    model = model_of(case.variant)
    mtp = model.graphs.mtp
    assert mtp is not None
    states: States = model.start(mtp, 1)
    rounds = list(mtp_rounds(case))
    assert [len(round_.drafts) for round_ in rounds] == [2, 2, 2]
    for round_ in rounds:
        results = run_head(model, states, round_.next_ids, round_.target_hidden, round_.positions)
        states = results.states
        for name in ("fc_out", "layer_out", "hidden", "logits"):
            deviation = close(case, f"{round_.name} {name}", results.outputs[name], getattr(round_, name))
            assert deviation < DEVIATION, name
        assert results.outputs["last_logits"].argmax() == round_.first_draft
        draft(case, model, round_, results)


def draft(case: Case, model: ReferenceModel, round_: Round, results: Results) -> None:
    """The chain of drafts after a round's rows, each fed the hidden state of the one before."""
    states, hidden = results.states, results.outputs["last_hidden"]
    for expected in round_.drafts:
        results = run_head(model, states, expected.next_ids, hidden, expected.positions)
        states, hidden = results.states, results.outputs["hidden"]
        assert close(case, round_.name, results.outputs["logits"][0, 0], expected.logits) < DEVIATION
        assert close(case, round_.name, hidden[0, 0], expected.hidden) < DEVIATION


def run_head(model: ReferenceModel, states: States, next_ids: Array, hidden: Array, positions: Array) -> Results:
    mtp = model.graphs.mtp
    assert mtp is not None
    past = states["mtp.layers.0.self_attn.key"].shape[2]
    valid = np.ones((1, past + next_ids.shape[1]), bool)
    inputs = {"next_ids": next_ids, "hidden": hidden.astype(np.float64), "positions": positions, "valid": valid}
    return model.run(mtp, inputs, states)


def test_bfloat16_is_near_the_library_in_bfloat16() -> None:
    """Rounding differs between implementations: within the distance of bfloat16 itself from float32."""
    case = case_named("next_bf16", "t20")
    model = ReferenceModel(case.folder, bf16)
    stage = next(walk(case))
    assert stage.logits_bfloat16 is not None
    inputs = {"token_ids": stage.token_ids, "positions": stage.positions, "valid": stage.valid}
    results = model.run(model.graphs.main, inputs, model.start(model.graphs.main, 1))
    logits = results.outputs["logits"]
    assert logits.dtype == bf16.numpy
    ours, theirs = (np.abs(found.astype(np.float64) - stage.logits) for found in (logits, stage.logits_bfloat16))
    assert ours.mean() < 1.5 * theirs.mean() and ours.max() < 2 * theirs.max()
