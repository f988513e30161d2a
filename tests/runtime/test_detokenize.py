"""Incremental decoding: any split of any ids gives the decoded whole, and no piece holds half a character."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.detokenize import StreamDecoder
from deltaloom.runtime.tokenizer import Tokenizer, byte_alphabet

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[2] / "models" / "tiny_next", 4096)
SPELLING = {byte: char for char, byte in byte_alphabet().items()}
BYTE_IDS = [TOKENIZER.token_to_id(SPELLING[byte]) for byte in range(256)]


def byte_ids(data: bytes) -> list[int]:
    """One token for each byte."""
    found = [BYTE_IDS[byte] for byte in data]
    assert None not in found
    return [token for token in found if token is not None]


def stream(ids: list[int], cuts: list[int], *, skip: bool = True) -> list[str]:
    decoder = StreamDecoder(TOKENIZER, skip_special_tokens=skip)
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [decoder.push(ids[start:stop]) for start, stop in zip(borders, borders[1:], strict=False)]
    return [*pieces, decoder.flush()]


def test_every_byte_has_a_token() -> None:
    data = bytes(range(256))
    assert [TOKENIZER.token_bytes(token)[0] for token in byte_ids(data)] == list(data)


IDS = (
    st.lists(st.integers(0, 4095), max_size=40)
    | st.binary(max_size=40).map(byte_ids)
    | st.text(max_size=20).map(TOKENIZER.encode)
)


@settings(deadline=None, max_examples=300)
@given(IDS, st.lists(st.integers(0, 1000), max_size=10), st.booleans())
def test_any_split_gives_the_whole(ids: list[int], cuts: list[int], skip: bool) -> None:
    assert "".join(stream(ids, cuts, skip=skip)) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_valid_text_never_shows_a_replacement(text: str) -> None:
    pieces = stream(byte_ids(text.encode()), list(range(100)))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_appears_once_it_is_complete() -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push([token]) for token in byte_ids("a🧵b".encode())] == ["a", "", "", "", "🧵", "b"]
    assert decoder.flush() == ""


def test_an_unfinished_character_shows_at_the_end() -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert decoder.push(byte_ids("é".encode()[:1])) == ""
    assert decoder.flush() == "\ufffd"


def test_special_tokens() -> None:
    ids = TOKENIZER.encode("a<|im_end|><tool_call>")
    assert "".join(stream(ids, [1])) == "a<tool_call>"
    assert "".join(stream(ids, [1], skip=False)) == "a<|im_end|><tool_call>"


def test_unknown_id_is_refused() -> None:
    with pytest.raises(RequestError, match="token id 4096"):
        StreamDecoder(TOKENIZER).push([4096])


def test_time_is_linear() -> None:
    """A decoder that looks back over the text would need minutes for this."""
    ids = byte_ids("naïve 🧵".encode()) * 20_000
    decoder = StreamDecoder(TOKENIZER)
    start = time.perf_counter()
    text = "".join(decoder.push([token]) for token in ids) + decoder.flush()
    assert time.perf_counter() - start < 10
    assert text == "naïve 🧵" * 20_000
