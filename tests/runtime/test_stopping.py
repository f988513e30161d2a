"""Stop strings in a stream, stop ids, min_tokens and max_tokens."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.params import GenerationDefaults, SamplingParams
from deltaloom.runtime.stopping import OutputText, StopStrings, TextStep
from deltaloom.runtime.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[2] / "models" / "tiny_next", 4096)
DEFAULTS = GenerationDefaults(eos_ids=(4089, 4087))
SMALL = st.text(alphabet="abé", max_size=30)


def cut_at_stop(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The whole text's result, found by growing it character by character."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    SMALL,
    st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 30)),
    st.booleans(),
)
def test_any_split_gives_the_whole(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    stream = StopStrings(stops, include=include)
    shown = "".join(stream.push(text[start:end]) for start, end in zip(borders, borders[1:], strict=False))
    assert (shown + stream.flush(), stream.matched) == cut_at_stop(text, stops, include=include)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["END", "\n\n"])
    assert [stream.push(piece) for piece in ["one E", "N", "X E", "\n", "two\n"]] == ["one ", "", "ENX ", "E", "\ntwo"]
    assert stream.flush() == "\n"
    assert stream.matched is None


def test_nothing_follows_a_stop_string() -> None:
    stream = StopStrings(["END"])
    assert [stream.push(piece) for piece in ["aEN", "Dtail", "more"]] == ["a", "", ""]
    assert stream.flush() == "" and stream.matched == "END"


def run(text: str | list[int], **fields: object) -> tuple[str, list[TextStep], int]:
    """Feed the tokens of ``text`` until the output ends: all text, the steps and the number of tokens taken."""
    ids = TOKENIZER.encode(text) if isinstance(text, str) else text
    output = OutputText(TOKENIZER, SamplingParams(**fields).resolve(DEFAULTS))
    steps: list[TextStep] = []
    for token in ids:
        steps.append(output.push(token))
        if output.finish_reason is not None:
            break
    assert output.finish_reason == steps[-1].finish_reason
    return "".join(step.text for step in steps) + output.close(), steps, output.tokens


def test_eos_ends_without_text() -> None:
    text, steps, tokens = run("It is five.<|im_end|>more")
    assert text == "It is five." and tokens == len(TOKENIZER.encode("It is five.")) + 1
    assert (steps[-1].finish_reason, steps[-1].stop_reason) == ("stop", 4089)
    assert run("a<|endoftext|>b")[1][-1].stop_reason == 4087


def test_ignore_eos() -> None:
    text, steps, _ = run("a<|im_end|>b", ignore_eos=True)
    assert text == "ab" and steps[-1].finish_reason is None


def test_stop_token_ids() -> None:
    assert run("a<tool_call>b", stop_token_ids=[4092])[0] == "a"
    assert run("a<tool_call>b", stop_token_ids=[4092], include_stop_str_in_output=True)[0] == "a<tool_call>"


def test_stop_string_across_tokens() -> None:
    text, steps, _ = run("one two three four", stop=["wo thr"])
    assert (text, steps[-1].finish_reason, steps[-1].stop_reason) == ("one t", "stop", "wo thr")
    assert run("one two three four", stop="wo thr", include_stop_str_in_output=True)[0] == "one two thr"


def test_max_tokens() -> None:
    ids = TOKENIZER.encode("one two three four five")
    text, steps, tokens = run(ids, max_tokens=3)
    assert (text, tokens) == (TOKENIZER.decode(ids[:3]), 3)
    assert (steps[-1].finish_reason, steps[-1].stop_reason) == ("length", None)


def test_text_held_back_is_shown_at_the_end() -> None:
    ids = TOKENIZER.encode("one two")
    assert run(ids, stop=["two three"])[0] == "one two"
    assert run(ids, stop=["two three"], max_tokens=len(ids))[0] == "one two"
    assert run([*ids, 4089], stop=["two three"])[0] == "one two"


def test_a_stop_beats_length_on_the_same_token() -> None:
    ids = TOKENIZER.encode("one two")
    assert run(ids, stop=["two"], max_tokens=len(ids))[1][-1] == TextStep(" ", "stop", "two")
    assert run([*ids, 4089], max_tokens=len(ids) + 1)[1][-1].finish_reason == "stop"


def test_min_tokens_delays_every_stop() -> None:
    text = "one two one two one two"
    ids = TOKENIZER.encode(text)
    third = len(TOKENIZER.encode("one two"))
    assert run(ids, stop=["two"])[0] == "one "
    assert run(ids, stop=["two"], min_tokens=third)[0] == "one two one "
    assert run([*ids[:3], 4089, *ids[3:]], min_tokens=10, max_tokens=100)[2] == len(ids) + 1
    assert run([*ids[:3], 4089, *ids[3:]], min_tokens=3)[2] == 4


def test_half_a_character_at_the_end() -> None:
    thread = TOKENIZER.encode("🧵")
    assert len(thread) > 1
    text, steps, _ = run(thread[:-1], max_tokens=len(thread) - 1)
    assert [step.text for step in steps[:-1]] == [""] * (len(thread) - 2)
    assert text == "\ufffd"


def test_an_ended_output_takes_no_more_tokens() -> None:
    output = OutputText(TOKENIZER, SamplingParams(max_tokens=1).resolve(DEFAULTS))
    output.push(5)
    with pytest.raises(RequestError, match="has ended"):
        output.push(5)


def test_close_ends_with_length() -> None:
    output = OutputText(TOKENIZER, SamplingParams(stop="abc").resolve(DEFAULTS))
    assert "".join(output.push(token).text for token in TOKENIZER.encode("xab")) == "x"
    assert output.close() == "ab" and output.finish_reason == "length" and output.close() == ""
