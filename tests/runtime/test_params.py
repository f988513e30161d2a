"""Sampling parameters: what is accepted, how defaults fill in, and a sentence for everything else."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.graph.errors import CheckpointError, RequestError
from deltaloom.runtime.params import GenerationDefaults, SamplingParams

TINY = Path(__file__).parents[2] / "models" / "tiny_next"
CARD = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "bos_token_id": 151643,
    "pad_token_id": 151643, "eos_token_id": [151645, 151643],
}  # fmt: skip
NAN = math.nan
BAD = [
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", 1.5, "whole number"),
    ("max_tokens", True, "whole number"),
    ("min_tokens", -1, "at least 0"),
    ("min_tokens", None, "whole number"),
    ("temperature", -0.1, "at least 0"),
    ("temperature", NAN, "finite"),
    ("temperature", math.inf, "finite"),
    ("temperature", "1", "must be a number"),
    ("temperature", True, "must be a number"),
    ("temperature", 10**400, "finite"),
    ("top_p", 1.01, "from 0 to 1"),
    ("top_p", -0.5, "from 0 to 1"),
    ("top_p", NAN, "from 0 to 1"),
    ("top_k", -2, "at least -1"),
    ("top_k", 2.0, "whole number"),
    ("top_k", False, "whole number"),
    ("min_p", 2, "from 0 to 1"),
    ("presence_penalty", 2.1, "from -2 to 2"),
    ("frequency_penalty", -3, "from -2 to 2"),
    ("repetition_penalty", 0, "greater than 0"),
    ("repetition_penalty", -1, "at least 0"),
    ("logit_bias", [1], "must map token ids"),
    ("logit_bias", {-1: 1.0}, "at least 0"),
    ("logit_bias", {"x": 1.0}, "whole number"),
    ("logit_bias", {1: 101}, r"logit_bias\[1\] is 101.0; it must be from -100 to 100"),
    ("logit_bias", {1: None}, "maps 1 to None"),
    ("logit_bias", {True: 1.0}, "whole number"),
    ("stop", "", "none of them empty"),
    ("stop", ["a", ""], "none of them empty"),
    ("stop", [1], "list of texts"),
    ("stop", 7, "list of texts"),
    ("stop_token_ids", [-1], r"stop_token_ids\[0\] is -1"),
    ("stop_token_ids", 5, "list of token ids"),
    ("stop_token_ids", [None], "list of token ids"),
    ("stop_token_ids", [1, True], r"stop_token_ids\[1\] is True"),
    ("ignore_eos", 1, "true or false"),
    ("skip_special_tokens", None, "true or false"),
    ("include_stop_str_in_output", "yes", "true or false"),
    ("seed", -1, "from 0 to 18446744073709551615"),
    ("seed", 2**64, "from 0 to"),
    ("seed", 1.0, "whole number"),
    ("n", 0, "from 1 to 128"),
    ("n", 129, "from 1 to 128"),
    ("n", None, "whole number"),
    ("n", True, "whole number"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("logprobs", True, "whole number"),
]


@pytest.mark.parametrize(("name", "value", "said"), BAD)
def test_bad_values_are_named(name: str, value: object, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)


def test_every_field_has_a_bad_value() -> None:
    assert {name for name, _, _ in BAD} == {entry.name for entry in dataclasses.fields(SamplingParams)}


@settings(deadline=None)
@given(
    st.sampled_from([entry.name for entry in dataclasses.fields(SamplingParams)]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers() | st.text())
    | st.dictionaries(st.integers() | st.text(max_size=2), st.floats() | st.none()),
)  # fmt: skip
def test_any_value_is_taken_or_refused_with_a_sentence(name: str, value: object) -> None:
    try:
        SamplingParams(**{name: value}).resolve(GenerationDefaults())
    except RequestError as error:
        assert name in str(error)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(RequestError, match="min_tokens is 5, more than max_tokens, which is 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_normal_forms() -> None:
    params = SamplingParams(
        stop="END", top_k=-1, logit_bias={"7": 1, 3: -2.5}, stop_token_ids=[4, 4, 2], temperature=1, seed=np.int64(3)
    )
    assert params.stop == ("END",)
    assert params.top_k == 0
    assert list(params.logit_bias.items()) == [(3, -2.5), (7, 1.0)]
    assert params.stop_token_ids == (4, 2)
    assert type(params.temperature) is float and type(params.seed) is int
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")


def test_defaults_of_the_published_card() -> None:
    defaults = GenerationDefaults.from_json(CARD, "generation_config.json")
    resolved = SamplingParams().resolve(defaults)
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p) == (0.7, 0.8, 20, 0.0)
    assert (resolved.presence_penalty, resolved.frequency_penalty, resolved.repetition_penalty) == (0.0, 0.0, 1.0)
    assert resolved.eos_ids == (151645, 151643) and resolved.end_ids == (151643, 151645)
    assert not resolved.greedy and not resolved.penalised
    assert resolved.max_tokens is None and resolved.n == 1 and resolved.logprobs is None


def test_request_wins_over_defaults() -> None:
    defaults = GenerationDefaults.from_json(CARD, "generation_config.json")
    params = SamplingParams(
        temperature=0, top_p=1.0, top_k=0, stop_token_ids=[9], ignore_eos=True, seed=11, repetition_penalty=1.1
    )
    resolved = params.resolve(defaults)
    assert resolved.greedy and resolved.penalised
    assert (resolved.top_p, resolved.top_k, resolved.seed) == (1.0, 0, 11)
    assert resolved.end_ids == (9,)


def test_defaults_of_the_tiny_model_are_greedy() -> None:
    defaults = GenerationDefaults.from_folder(TINY)
    assert (defaults.temperature, defaults.eos_ids) == (0.0, (4089, 4087))
    assert SamplingParams(temperature=0.7).resolve(defaults).temperature == 0.7


def test_without_a_file_sampling_is_plain(tmp_path: Path) -> None:
    resolved = SamplingParams().resolve(GenerationDefaults.from_folder(tmp_path))
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("content", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": True}, 1.0),
        ({"do_sample": False, "temperature": 0.5}, 0.0),
    ],
)
def test_do_sample_decides(content: dict[str, object], temperature: float) -> None:
    assert GenerationDefaults.from_json(content, "file").temperature == temperature


def test_max_new_tokens_is_the_default_budget() -> None:
    defaults = GenerationDefaults.from_json({"max_new_tokens": 20, "eos_token_id": 3}, "file")
    assert SamplingParams().resolve(defaults).max_tokens == 20
    assert SamplingParams(max_tokens=5).resolve(defaults).max_tokens == 5
    assert SamplingParams(min_tokens=30).resolve(defaults).max_tokens == 30
    assert defaults.eos_ids == (3,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"top_p": 3}, "top_p is 3.0"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id\[1\] is 'x'"),
        ({"eos_token_id": -4}, r"eos_token_id\[0\] is -4"),
    ],
)
def test_bad_generation_config(tmp_path: Path, content: dict[str, object], said: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said) as caught:
        GenerationDefaults.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("{", "is not valid JSON"), ("[]", "holds a list of 0")])
def test_damaged_generation_config(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        GenerationDefaults.from_folder(tmp_path)


def test_seeds_are_drawn_and_kept() -> None:
    seeds = {SamplingParams().resolve(GenerationDefaults()).seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**64 for seed in seeds)
    assert SamplingParams(seed=0).resolve(GenerationDefaults()).seed == 0
