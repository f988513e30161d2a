"""Compiled programs of every backend against the outputs of the library: logits, hidden states, caches, drafts, padding, FP8."""

from functools import cache

import numpy as np
import pytest
from goldens.golden_data import Case, case_named, cases, close, compare, mtp_rounds, walk

import deltaloom
from deltaloom.runtime.model import Model

INDUCTOR_QUICK = ("next_base", "next_dense_mix", "qwen3_moe")


def engines() -> list[object]:
    """(backend, case) pairs; torch.compile is slow, so most of its cases run under ``make test-all`` only."""
    quick = [pytest.param(b, case, id=f"{b}-{case}") for b in ("numpy", "torch", "onnx") for case in cases()]
    for case in cases():
        slow = case.variant not in INDUCTOR_QUICK
        quick.append(pytest.param("inductor", case, id=f"inductor-{case}", marks=[pytest.mark.slow] if slow else []))
    return quick


@cache
def model_of(variant: str, backend: str, dtype: str = "float32") -> Model:
    return deltaloom.load(cases(variant)[0].folder, backend=backend, dtype=dtype)


@pytest.mark.parametrize(("backend", "case"), engines())
def test_every_stage_agrees(backend: str, case: Case) -> None:
    model = model_of(case.variant, backend)
    state = None
    for stage in walk(case):
        state = state or model.new_state(len(stage.token_ids))
        mask = None if stage.valid.all() else stage.valid
        out = model.forward(stage.token_ids, state=state, attention_mask=mask, output_hidden_states=True)
        assert out.logits is not None and out.hidden_states is not None and out.final_norm is not None
        arrays = state.arrays()
        compare(
            case,
            stage,
            logits=out.logits,
            hidden=out.hidden_states,
            final_norm=out.final_norm,
            state=arrays.__getitem__,
        )
        real = stage.real
        np.testing.assert_array_equal(out.logits[real].argmax(-1), stage.logits[real].argmax(-1))


@pytest.mark.parametrize("backend", ["numpy", "torch", "onnx", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", cases("next_mtp"), ids=str)
def test_mtp_rounds_agree_and_drafts_roll_back(backend: str, case: Case) -> None:
    model = model_of(case.variant, backend)
    assert model.mtp is not None
    state = model.mtp.new_state(1)
    for round_ in mtp_rounds(case):
        wanted = ("fc_out", "layer_out", "hidden", "logits")
        rows = model.mtp.forward(round_.next_ids, round_.target_hidden, round_.positions, state, outputs=wanted)
        for name in wanted:
            close(case, f"{round_.name} {name}", rows[name], getattr(round_, name))
        assert rows["logits"][0, -1].argmax() == round_.first_draft
        kept, hidden = state.length, rows["hidden"][:, -1:]
        for draft in round_.drafts:
            step = model.mtp.forward(draft.next_ids, hidden, draft.positions, state)
            close(case, f"{round_.name} draft", step["logits"][0, 0], draft.logits)
            close(case, f"{round_.name} draft", step["hidden"][0, 0], draft.hidden)
            hidden = step["hidden"]
        state.truncate(kept)


def test_bfloat16_on_torch_is_as_near_as_the_library_in_bfloat16() -> None:
    """Rounding differs between implementations: ours must be no farther from float32 than 1.5 times the library's own."""
    case = case_named("next_bf16", "t20")
    (stage, *_) = walk(case)
    out = model_of(case.variant, "torch", "bfloat16").forward(stage.token_ids)
    assert out.logits is not None and stage.logits_bfloat16 is not None
    ours = np.sqrt(np.mean((out.logits - stage.logits) ** 2))
    theirs = np.sqrt(np.mean((stage.logits_bfloat16 - stage.logits) ** 2))
    assert 0 < ours < 1.5 * theirs
