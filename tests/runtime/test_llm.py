"""LLM: prompts, chat, streams, scores, limits and errors, on the bundled model with NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import deltaloom
from deltaloom.graph.errors import ConfigError, RequestError
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.llm import LLM
from deltaloom.runtime.params import SamplingParams
from deltaloom.runtime.results import GenerationResult

QUESTION = [{"role": "user", "content": "What is the opposite of hot?"}]
ANSWER = "The opposite of hot is cold."
STORY = "Once upon a time"
GREEDY = SamplingParams(max_tokens=24, temperature=0)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-next", backend="numpy", dtype="float32")


def text(result: GenerationResult) -> str:
    return result.outputs[0].text


def test_a_result_holds_text_ids_reason_and_counts(llm: LLM) -> None:
    result = llm.chat(QUESTION, params=GREEDY)
    (output,) = result.outputs
    assert output.text == ANSWER
    assert (output.finish_reason, output.stop_reason) == ("stop", llm.tokenizer.eos_id)
    assert output.token_ids[-1] == llm.tokenizer.eos_id and output.logprobs is None
    assert llm.tokenizer.decode(output.token_ids) == ANSWER
    assert result.prompt == "<|im_start|>user\nWhat is the opposite of hot?<|im_end|>\n<|im_start|>assistant\n"
    assert result.prompt_token_ids == llm.tokenizer.encode(result.prompt)
    assert result.metrics.prompt_tokens == len(result.prompt_token_ids)
    assert result.metrics.generated_tokens == len(output.token_ids)
    assert result.metrics.prefill_seconds > 0 and result.metrics.decode_seconds > 0


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(llm: LLM) -> None:
    ids = llm.tokenizer.encode(STORY)
    one = llm.generate(STORY, GREEDY)
    assert (one.prompt, one.prompt_token_ids) == (STORY, ids)
    assert llm.generate(ids, GREEDY).outputs == one.outputs
    assert llm.generate(ids, GREEDY).prompt is None
    several = llm.generate([STORY, "The sea", STORY], GREEDY)
    assert [result.prompt for result in several] == [STORY, "The sea", STORY]
    assert several[0].outputs == several[2].outputs == one.outputs
    assert llm.generate([ids], GREEDY)[0].outputs == one.outputs
    assert llm.chat([QUESTION, QUESTION], params=GREEDY)[1].outputs[0].text == ANSWER


def test_more_prompts_than_max_batch_run_in_groups_and_keep_their_order() -> None:
    small = LLM("tiny-next", max_batch=2)
    prompts = ["The", STORY, "A", "It was a dark and stormy night; the rain fell", "I am"]
    widths: list[tuple[int, int]] = []
    watch_forward(small, lambda ids: widths.append(np.shape(ids)))  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=6, temperature=0)
    results = small.generate(prompts, params)
    assert [result.prompt for result in results] == prompts
    assert max(rows for rows, _ in widths) == 2
    for prompt, result in zip(prompts, results, strict=True):
        assert small.generate(prompt, params).outputs == result.outputs


def test_a_row_that_ends_leaves_the_batch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(llm.model, "forward", watched(llm, lambda ids: rows.append(len(ids))))
    params = [SamplingParams(max_tokens=count, temperature=0) for count in (2, 5, 3)]
    results = llm.generate([STORY, "The sea", "It was"], params)
    assert [len(result.outputs[0].token_ids) for result in results] == [2, 5, 3]
    assert rows == [3, 3, 2, 1, 1]


def watched(llm: LLM, note: Callable[[Any], object]) -> Callable[..., Any]:
    forward = llm.model.forward

    def noted(token_ids: Any, **options: Any) -> Any:
        note(token_ids)
        return forward(token_ids, **options)

    return noted


def watch_forward(llm: LLM, note: Callable[[Any], object]) -> None:
    llm.model.forward = watched(llm, note)  # type: ignore[method-assign]


def test_samples_share_the_prefill_and_differ(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(llm.model, "forward", watched(llm, lambda ids: rows.append(len(ids))))
    params = SamplingParams(max_tokens=8, temperature=1, seed=7, n=10, ignore_eos=True)
    outputs = llm.generate(STORY, params).outputs
    assert [output.index for output in outputs] == list(range(10))
    assert len({output.text for output in outputs}) == 10
    assert rows == [1, *[8] * 7, *[2] * 7]  # ten samples: eight and two at a time after one prefill
    alone = llm.generate(STORY, SamplingParams(max_tokens=8, temperature=1, seed=7, ignore_eos=True)).outputs[0]
    assert alone == outputs[0]


def test_a_seed_is_drawn_and_reported_and_repeats_the_run(llm: LLM) -> None:
    free = SamplingParams(max_tokens=12, temperature=1)
    first, second = llm.generate(STORY, free), llm.generate(STORY, free)
    assert first.seed != second.seed and text(first) != text(second)
    again = llm.generate(STORY, SamplingParams(max_tokens=12, temperature=1, seed=first.seed))
    assert again.outputs == first.outputs


def test_a_stream_joins_to_what_generate_gives(llm: LLM) -> None:
    for params in (
        SamplingParams(max_tokens=20, temperature=1, seed=3, n=2, logprobs=1),
        SamplingParams(max_tokens=20, temperature=0, stop=["whole of"]),
    ):
        result = llm.generate(STORY, params)
        pieces = list(llm.stream(STORY, params))
        for output in result.outputs:
            mine = [piece for piece in pieces if piece.index == output.index]
            assert "".join(piece.text for piece in mine) == output.text
            assert [token for piece in mine for token in piece.token_ids] == output.token_ids
            assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [output.finish_reason]
            assert ([piece.logprobs for piece in mine] if params.logprobs else None) == output.logprobs
    assert "".join(piece.text for piece in llm.stream(QUESTION, GREEDY)) == ANSWER


def test_a_stream_gives_its_first_piece_before_the_last_is_made(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(llm.model, "forward", watched(llm, lambda ids: calls.append(1)))
    stream = llm.stream(STORY, GREEDY)
    next(stream)
    assert len(calls) == 1


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    whole = llm.generate(STORY, GREEDY).outputs[0]
    stop = whole.text[5:9]
    (output,) = llm.generate(STORY, SamplingParams(max_tokens=24, temperature=0, stop=[stop, "never"])).outputs
    assert output.text == whole.text[: whole.text.find(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]


def test_logprobs_are_those_of_the_forward_pass(llm: LLM) -> None:
    result = llm.generate(STORY, SamplingParams(max_tokens=5, temperature=0, logprobs=3))
    (output,) = result.outputs
    assert output.logprobs is not None and len(output.logprobs) == 5
    whole = llm.model.forward([result.prompt_token_ids + output.token_ids[:-1]]).logits
    assert whole is not None
    rows = whole[0, len(result.prompt_token_ids) - 1 :].astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    for entry, token, row in zip(output.logprobs, output.token_ids, expected, strict=True):
        assert entry.top_ids[0] == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert entry.top_logprobs == pytest.approx(np.sort(row)[-3:][::-1], abs=1e-4)


def test_score_is_the_forward_pass_and_knows_greedy(llm: LLM) -> None:
    greedy = llm.generate(STORY, SamplingParams(max_tokens=6, temperature=0, logprobs=1))
    prompt, output = greedy.prompt_token_ids, greedy.outputs[0]
    assert output.logprobs is not None
    score = llm.score(prompt, output.token_ids)
    assert score.greedy and score.token_ids == output.token_ids
    assert score.token_logprobs == pytest.approx([entry.logprob for entry in output.logprobs], abs=1e-4)
    assert score.logprob == pytest.approx(sum(score.token_logprobs))
    unlikely = llm.score(prompt, list(reversed(output.token_ids)))
    assert not unlikely.greedy and unlikely.logprob < score.logprob
    assert llm.score(prompt[:1], prompt[1:]).token_ids == prompt[1:]


def test_score_of_texts_gives_trailing_spaces_to_the_continuation(llm: LLM) -> None:
    apart = llm.score("The opposite of hot is ", "cold.")
    assert apart == llm.score("The opposite of hot is", " cold.")
    assert llm.tokenizer.decode(apart.token_ids) == " cold."
    assert apart.logprob > llm.score("The opposite of hot is", " seventeen.").logprob


def test_tools_are_shown_to_the_model_and_called(llm: LLM) -> None:
    result = llm.chat([{"role": "user", "content": "What is the weather in Paris?"}], tools=[TOOL], params=GREEDY)
    assert result.prompt is not None and '"name": "get_weather"' in result.prompt
    assert "<tool_call>" in text(result) and "get_weather" in text(result)


def test_typed_control_tokens_stay_text_in_chat_and_are_tokens_in_a_prompt(llm: LLM) -> None:
    typed = [{"role": "user", "content": "<|im_end|>"}]
    assert llm.chat(typed, params=GREEDY).prompt_token_ids.count(llm.tokenizer.eos_id or -1) == 1
    assert llm.generate("<|im_end|>", GREEDY).prompt_token_ids == [llm.tokenizer.eos_id]


def test_defaults_come_from_the_checkpoint_and_can_be_turned_off(llm: LLM) -> None:
    assert (llm.defaults.temperature, llm.defaults.eos_ids) == (0, (4089, 4087))
    neutral = LLM("tiny-next", generation_config="none")
    assert (neutral.defaults.temperature, neutral.defaults.eos_ids) == (1, (4089, 4087))
    with pytest.raises(ConfigError, match="generation_config is 'maybe', expected 'auto' or 'none'"):
        LLM("tiny-next", generation_config="maybe")  # type: ignore[arg-type]


def test_output_ends_where_the_context_ends() -> None:
    small = LLM("tiny-next", max_model_len=12)
    params = SamplingParams(temperature=0, ignore_eos=True, min_tokens=50)
    prompts = [[46, 710, 830], [46, 710, 830, 259, 622, 11, 292, 266, 307]]
    results = small.generate(prompts, params)
    # the short prompt gets its own room, though padding makes it as wide as the long one
    assert [len(result.outputs[0].token_ids) for result in results] == [9, 3]
    assert {result.outputs[0].finish_reason for result in results} == {"length"}
    assert small.generate(prompts[0], params).outputs == results[0].outputs
    with pytest.raises(RequestError, match="prompt 0 has 12 tokens, .* maximum context length is 12"):
        small.generate([5] * 12)
    assert len(small.generate([5] * 11).outputs[0].token_ids) == 1


def test_a_short_prompt_beside_one_of_several_chunks_is_as_alone() -> None:
    small = LLM("tiny-next", config=CompileConfig(prefill_chunk=32))
    long = small.tokenizer.encode("It was the best of times, it was the worst of times, " * 8)
    assert len(long) > 3 * 32
    prompts = [long, small.tokenizer.encode("Once upon a time")]  # two chunks hold nothing of the short one
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=5)
    for prompt, result in zip(prompts, small.generate(prompts, params), strict=True):
        assert small.generate(prompt, params).outputs == result.outputs


def test_padding_rows_of_the_vocabulary_never_win(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "vocab_size", 300)
    output = llm.generate(STORY, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)).outputs[0]
    assert len(output.token_ids) == 20 and max(output.token_ids) < 300
    drawn = llm.generate(STORY, SamplingParams(max_tokens=20, temperature=2, seed=1, ignore_eos=True)).outputs[0]
    assert max(drawn.token_ids) < 300


def test_logits_that_are_not_finite_fail_and_name_the_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = llm.model.forward

    def poisoned(token_ids: Any, **options: Any) -> Any:
        output = forward(token_ids, **options)
        assert output.logits is not None
        output.logits[-1, 0, 7] = np.nan
        return output

    monkeypatch.setattr(llm.model, "forward", poisoned)
    with pytest.raises(RequestError, match="prompt 0, sample 0: the logits hold NaN or infinity at position 5"):
        llm.generate([STORY, "The"], GREEDY)  # sorted by length, the longer prompt is the last row
    with pytest.raises(RequestError, match="score: the logits of the continuation hold NaN"):
        llm.score([2], [3])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda llm: llm.generate(""), "the prompt is empty"),
        (lambda llm: llm.generate([]), "the prompt is empty"),
        (lambda llm: llm.generate(["The", ""]), "prompt 1 is empty"),
        (lambda llm: llm.generate([[1], []]), "prompt 1 is empty"),
        (lambda llm: llm.generate([1, 4096]), "prompt 0 has the token id 4096; the model's ids are 0 to 4095"),
        (lambda llm: llm.generate([-1]), "prompt 0 has the token id -1"),
        (lambda llm: llm.generate([1, "a"]), "prompt 0 is 1; expected a text or a list of token ids"),
        (lambda llm: llm.generate([True]), "prompt 0 is True"),
        (lambda llm: llm.generate([[1, 2.5]]), "prompt 0 is .*; expected a text or a list of token ids"),
        (lambda llm: llm.generate({"a": 1}), "the prompt is a dict"),
        (lambda llm: llm.generate("a\ud800"), "not valid Unicode"),
        (lambda llm: llm.generate([5] * 2048), "maximum context length is 2048"),
        (lambda llm: llm.generate(["a", "b"], [GREEDY]), "2 prompts but 1 sampling parameters"),
        (lambda llm: llm.chat([]), "at least one message"),
        (lambda llm: llm.chat([{"role": "king", "content": "x"}]), r"messages\[0\].role is 'king'"),
        (lambda llm: llm.chat("hello"), "messages is 'hello'"),
        (lambda llm: llm.chat([{"role": "user", "content": "a " * 3000}]), "the conversation .* maximum context length"),
        (lambda llm: llm.stream(["a", "b"]), "stream takes one prompt, got a list of 2"),
        (lambda llm: llm.stream(""), "the prompt is empty"),
        (lambda llm: llm.score("", "a"), "the prompt is empty"),
        (lambda llm: llm.score("a", ""), "the continuation is empty"),
        (lambda llm: llm.score("a", [1]), "one kind: two texts or two token-id lists"),
        (lambda llm: llm.score([1], [5] * 2048), "the prompt with its continuation has 2049 tokens"),
        (lambda llm: llm.score([1], [9999]), "with its continuation has the token id 9999"),
    ],
)
def test_a_bad_request_is_a_sentence(llm: LLM, call: Callable[[LLM], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(llm)


def test_a_context_can_be_filled_by_scoring(llm: LLM) -> None:
    assert len(llm.score([1], [5] * 2047).token_ids) == 2047


def test_public_names_lead_here() -> None:
    assert deltaloom.LLM is LLM and deltaloom.SamplingParams is SamplingParams
    with pytest.raises(ConfigError, match="max_batch is 0, expected at least 1"):
        LLM("tiny-next", max_batch=0)
    with pytest.raises(ConfigError, match="max_model_len is 0, expected at least 1"):
        LLM("tiny-next", max_model_len=0)


def test_what_are_no_sampling_parameters_is_a_sentence() -> None:
    llm = LLM("tiny-next")
    for params in ({"max_tokens": 1}, 5, "x", [5]):
        with pytest.raises(RequestError, match="expected SamplingParams"):
            llm.generate(["a"], params)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="chat_template_kwargs is 5"):
        llm.chat([{"role": "user", "content": "a"}], chat_template_kwargs=5)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="has 2049 tokens, but the model's maximum context length is 2048;"):
        llm.score([1] * 2047, [1, 1])
