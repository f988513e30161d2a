"""The sampler against slow definitions written out token by token, hand-worked cases, and frequencies."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltaloom.graph.errors import RequestError
from deltaloom.ops import sampling
from deltaloom.ops.philox import uniform
from deltaloom.runtime.params import GenerationDefaults, SamplingParams
from deltaloom.runtime.sampler import SequenceHistory, non_finite_rows, sample

DEFAULTS = GenerationDefaults(eos_ids=(3,))


def history(
    prompt: list[int] | None = None, output: list[int] | None = None, *, index: int = 0, **fields: object
) -> SequenceHistory:
    made = SequenceHistory(SamplingParams(**{"seed": 1, **fields}).resolve(DEFAULTS), prompt or [0], sample_index=index)
    for token in output or []:
        made.append(token)
    return made


def row(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def kept(logits: NDArray[np.floating], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    filtered = sampling.filter_top_k_top_p_min_p(logits.astype(np.float64), np.array([top_k]), np.array([top_p]), np.array([min_p]))
    ids = np.flatnonzero(np.isfinite(filtered[0]))
    assert np.array_equal(filtered[0, ids], logits[0, ids].astype(np.float64))
    return [int(token) for token in ids]


def kept_slowly(scores: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if top_k:
        order = order[:top_k]
    total = math.fsum(math.exp(scores[token]) for token in order)
    chosen: list[int] = []
    for token in order:
        if chosen and math.fsum(math.exp(scores[one]) for one in chosen) / total >= top_p < 1:
            break
        chosen.append(token)
    return {token for token in chosen if math.exp(scores[token] - scores[order[0]]) >= min_p}


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12),
    st.integers(0, 13),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_filters_against_the_slow_definition(scores: list[float], top_k: int, top_p: float, min_p: float) -> None:
    total = sum(math.exp(score) for score in scores)
    near = any(  # top_p within rounding of a border decides nothing
        abs(sum(math.exp(s) for s in sorted(scores, reverse=True)[:count]) / part - top_p) < 1e-9
        for count in range(1, len(scores) + 1)
        for part in (total, sum(math.exp(s) for s in sorted(scores, reverse=True)[: top_k or None]))
    )
    if not near:
        assert set(kept(np.array([scores]), top_k, top_p, min_p)) == kept_slowly(scores, top_k, top_p, min_p)


def test_ties_at_the_border_go_to_the_lowest_id() -> None:
    logits = row(1, 2, 2, 0, 2)
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=2) == [1, 2]
    assert kept(logits, top_k=4) == [0, 1, 2, 4]
    assert kept(row(0, 0, 0, 0), top_p=0.5) == [0, 1]
    assert kept(row(0, 0, 0, 0), top_p=0.6) == [0, 1, 2]


def test_top_p_keeps_at_least_one_and_acts_after_top_k() -> None:
    logits = np.log(row(0.5, 0.2, 0.2, 0.1))
    assert kept(logits, top_p=0.0) == [0]
    assert kept(logits, top_p=0.6) == [0, 1]
    assert kept(logits, top_k=2, top_p=0.6) == [0]  # 0.5 of the remaining 0.7 reaches 0.6
    assert kept(logits, min_p=0.3) == [0, 1, 2]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3]
    assert kept(row(0, -60, -60), top_p=1.0) == [0, 1, 2]  # off, although 1 + exp(-60) rounds to 1


def test_penalties_by_hand() -> None:
    penalised = sampling.apply_penalties(
        np.array([[2.0, -2.0, 2.0, 1.0]]), np.array([[True, True, False, True]]), np.array([[0, 3, 0, 1]], np.int32),
        np.array([2.0]), np.array([0.5]), np.array([0.25]),
    )  # fmt: skip
    assert penalised.tolist() == [[1.0, -4.0 - 0.75 - 0.5, 2.0, 0.5 - 0.25 - 0.5]]


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True))
def test_draw_is_the_inverse_cumulative_distribution(scores: list[float], number: float) -> None:
    chosen = int(sampling.draw(np.array([scores]), np.array([number]))[0])
    weights = [math.exp(score) for score in scores]
    below = math.fsum(weights[:chosen]) / math.fsum(weights)
    above = math.fsum(weights[: chosen + 1]) / math.fsum(weights)
    assert below - 1e-12 <= number <= above + 1e-12


def test_draw_never_takes_a_removed_token() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    assert [int(sampling.draw(logits, np.array([u]))[0]) for u in (0.0, 0.49, 0.5, 1 - 2**-24)] == [1, 1, 3, 3]


def test_frequencies_follow_the_softmax() -> None:
    probabilities = np.array([0.5, 0.05, 0.3, 0.15])
    logits = np.tile(np.log(probabilities), (4000, 1)).astype(np.float32)
    ids = sample(logits, [history(temperature=1.0, index=index) for index in range(4000)]).ids
    assert np.abs(np.bincount(ids, minlength=4) / 4000 - probabilities).max() < 0.025


def test_a_draw_is_the_philox_number_of_its_place() -> None:
    """Three equal tokens: the uniform number's third names the token, whatever else is in the batch."""
    for position in range(2, 30):
        one = history([0] * (position - 1), [1], temperature=1.0, seed=42, index=5)
        number = float(uniform(42, 5, position))
        alone = sample(row(0, 0, 0), [one]).ids[0]
        batch = sample(np.repeat(row(0, 0, 0), 2, 0), [history(temperature=1.0), one]).ids[1]
        assert alone == batch == int(number * 3)


def test_greedy_takes_the_lowest_of_equals_and_respects_allowed() -> None:
    logits = row(1, 5, 5, 9)
    assert sample(logits, [history(temperature=0)]).ids.tolist() == [3]
    assert sample(logits, [history(temperature=0)], allowed=3).ids.tolist() == [1]
    for index in range(50):
        assert sample(logits, [history(temperature=1.0, index=index)], allowed=3).ids[0] < 3
    assert sample(logits, [history([3], temperature=0, repetition_penalty=1.5)], allowed=3).ids.tolist() == [1]


def test_temperature() -> None:
    logits = row(0, 1, 2)
    for index in range(50):
        assert sample(logits, [history(temperature=0.01, index=index)]).ids[0] == 2
        assert sample(logits, [history(temperature=1e-300, index=index)]).ids[0] == 2
    hot = {int(sample(logits, [history(temperature=50.0, index=index)]).ids[0]) for index in range(50)}
    assert hot == {0, 1, 2}


def test_penalties_look_at_the_right_tokens() -> None:
    logits = row(1.0, 1.2, 1.1)
    assert sample(logits, [history([1], temperature=0, repetition_penalty=2.0)]).ids[0] == 2  # the prompt counts
    assert sample(logits, [history([1], temperature=0, presence_penalty=1.0)]).ids[0] == 1  # the prompt does not
    assert sample(logits, [history([0], [1], temperature=0, presence_penalty=1.0)]).ids[0] == 2
    assert sample(logits, [history([0], [1, 2], temperature=0, frequency_penalty=0.15)]).ids[0] == 1
    assert sample(logits, [history([0], [1, 1, 2], temperature=0, frequency_penalty=0.15)]).ids[0] == 0


def test_logit_bias() -> None:
    assert sample(row(0, 1, 0), [history(temperature=0, logit_bias={2: 1.5})]).ids[0] == 2
    assert sample(row(0, 1, 0), [history(temperature=1.0, logit_bias={1: -100, 2: -100})]).ids[0] == 0
    with pytest.raises(RequestError, match="logit_bias names token id 3; the vocabulary has ids 0 to 2"):
        sample(row(0, 1, 0), [history(temperature=0, logit_bias={3: 1.0})])


def test_min_tokens_masks_what_ends_the_text() -> None:
    logits = row(0, 5, 1, 9)
    wanted = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [1]}
    assert sample(logits, [history(**wanted)]).ids[0] == 2
    assert sample(logits, [history([0], [2], **wanted)]).ids[0] == 2
    assert sample(logits, [history([0], [2, 2], **wanted)]).ids[0] == 3
    with pytest.raises(RequestError, match="no token is left for sequence 0"):
        sample(row(0, 0, 0, 0), [history(temperature=0, min_tokens=1, stop_token_ids=[0, 1, 2])])


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.log(row(0.1, 0.2, 0.3, 0.4))
    result = sample(
        np.repeat(logits, 3, 0),
        [
            history(temperature=0, logprobs=2, logit_bias={0: 100}),
            history(temperature=0),
            history(temperature=0, logprobs=0),
        ],
    )
    assert result.ids.tolist() == [0, 3, 3]
    first, second, third = result.logprobs
    assert first is not None and third is not None and second is None
    assert first.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert first.top_ids == (3, 2) and first.top_logprobs == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-6)
    assert third.top_ids == () and third.logprob == pytest.approx(math.log(0.4), abs=1e-6)


def test_top_logprobs_break_ties_by_id_and_leave_padding_rows_out() -> None:
    result = sample(row(1, 2, 2, 2, 3), [history(temperature=0, logprobs=3)], allowed=4).logprobs[0]
    assert result is not None and result.top_ids == (1, 2, 3)
    total = math.log(sum(math.exp(value) for value in (1, 2, 2, 2, 3)))
    assert result.logprob == pytest.approx(2 - total)
    few = sample(row(1, 2), [history(temperature=0, logprobs=20)]).logprobs[0]
    assert few is not None and few.top_ids == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_refused(value: float, temperature: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = value
    assert non_finite_rows(logits) == [1]
    with pytest.raises(RequestError, match="logits of sequence 1 hold NaN or infinity at position 1"):
        sample(logits, [history(temperature=temperature) for _ in range(3)])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(RequestError, match=r"shape \[1, 2\] do not fit 2 sequences"):
        sample(row(0, 0), [history(), history()])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_its_batch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(5, 40)).astype(np.float32)
    requests = [
        history([1, 2], [5, 5, 7], temperature=0),
        history([1, 2], [5, 7], temperature=0.7, top_k=20, top_p=0.8),
        history([9], temperature=1.3, min_p=0.1, presence_penalty=1.5, frequency_penalty=0.2),
        history([9], [4], temperature=1.0, repetition_penalty=1.3, min_tokens=4),
        history([1], temperature=0, logit_bias={4: 3.0}),
    ]
    whole = sample(logits, requests).ids.tolist()
    assert whole == [int(sample(logits[i : i + 1], [requests[i]]).ids[0]) for i in range(5)]
    order = [3, 1, 4, 0, 2]
    assert sample(logits[order], [requests[i] for i in order]).ids.tolist() == [whole[i] for i in order]


@pytest.mark.parametrize("penalty", [1e308, 1e-308, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-300])
def test_extreme_penalties_still_choose_a_token(penalty: float, temperature: float) -> None:
    logits = np.array([[3.0, -2.0, 1.0, 0.5]], np.float32)
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature, seed=1, top_p=0.9, top_k=10**30, max_tokens=1)
    made = SequenceHistory(params.resolve(GenerationDefaults()), [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = int(sample(logits, [made]).ids[0])
    assert chosen == 0 if penalty < 1 else chosen in (2, 3)
