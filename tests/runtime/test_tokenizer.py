"""The tokenizer against the tokenizers library, the tiny model's reference generations, and damaged files."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.graph.errors import CheckpointError, RequestError
from deltaloom.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny_next"
TOKENIZER = Tokenizer.from_folder(TINY, 4096)
LIBRARY = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
ADDED = {
    "<|endoftext|>": 4087, "<|im_start|>": 4088, "<|im_end|>": 4089, "<think>": 4090, "</think>": 4091,
    "<tool_call>": 4092, "</tool_call>": 4093, "<tool_response>": 4094, "</tool_response>": 4095,
}  # fmt: skip
TEXTS = st.text() | st.lists(st.sampled_from([*ADDED, "a", " ", "\n", "é", "e\u0301", "'s", "<", "|>"])).map("".join)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model's tokenizer files that a test may damage."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "DROP"}))


def test_facts_of_the_tiny_model() -> None:
    assert TOKENIZER.vocab_size == 4096
    assert (TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.bos_id) == (4089, 4087, None)
    assert TOKENIZER.special_ids == {4087, 4088, 4089}
    assert TOKENIZER.added_tokens == ADDED
    assert TOKENIZER.named_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert TOKENIZER.token_to_id("<tool_call>") == 4092
    assert TOKENIZER.id_to_token(4092) == "<tool_call>"
    assert TOKENIZER.id_to_token(4096) is None and TOKENIZER.token_to_id("no such token") is None
    assert TOKENIZER.chat_template == (TINY / "chat_template.jinja").read_text()


def test_reference_generations_round_trip() -> None:
    items = json.loads((ROOT / "tests/golden/tiny_next/reference_generations.json").read_text())["items"]
    for item in items:
        assert TOKENIZER.decode(item["output_ids"], skip_special_tokens=False) == item["output_text"]
        assert TOKENIZER.encode(TOKENIZER.decode(item["prompt_ids"], skip_special_tokens=False)) == item["prompt_ids"]


@settings(deadline=None)
@given(TEXTS)
def test_encode_agrees_with_the_library(text: str) -> None:
    assert TOKENIZER.encode(text) == LIBRARY.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("token", ADDED)
def test_typed_control_token_is_ordinary_text(token: str) -> None:
    assert TOKENIZER.encode(token) == [ADDED[token]]
    text = f"see {token}{token} and\n{token}"
    ids = TOKENIZER.encode(text, allow_special=False)
    assert max(ids) < 4087
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@settings(deadline=None)
@given(TEXTS)
def test_plain_encoding_differs_only_at_added_tokens(text: str) -> None:
    ids = TOKENIZER.encode(text, allow_special=False)
    assert not set(ids) & set(ADDED.values())
    if not any(token in text for token in ADDED):
        assert ids == TOKENIZER.encode(text)


def test_added_token_spans() -> None:
    text = "é中<|im_end|>e\u0301<tool_call>x"
    spans = TOKENIZER.added_token_spans(text)
    assert [(text[start:stop], token) for start, stop, token in spans] == [("<|im_end|>", 4089), ("<tool_call>", 4092)]
    assert TOKENIZER.added_token_spans("plain") == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=30), st.booleans())
def test_decode_agrees_with_the_library(ids: list[int], skip: bool) -> None:
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == LIBRARY.decode(ids, skip_special_tokens=skip)


def test_skipping_special_tokens_keeps_tool_calls() -> None:
    ids = TOKENIZER.encode("a<|im_start|><tool_call></think>b<|im_end|><|endoftext|>")
    assert TOKENIZER.decode(ids) == "a<tool_call></think>b"


@pytest.mark.parametrize("token", [-1, 4096, 151_700])
def test_ids_without_a_token_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match=f"token id {token} has no text.*0 to 4095"):
        TOKENIZER.decode([1, token])


@pytest.mark.parametrize("special", [True, False])
def test_lone_surrogate_is_refused(special: bool) -> None:
    with pytest.raises(RequestError, match="lone surrogate.*character 3"):
        TOKENIZER.encode("abc\ud800", allow_special=special)


def test_wrong_vocabulary() -> None:
    with pytest.raises(CheckpointError, match="wrong vocabulary: the tokenizer has 4096 ids, the model has 4095"):
        Tokenizer.from_folder(TINY, 4095)
    assert Tokenizer.from_folder(TINY, 5000).vocab_size == 4096


def test_missing_and_broken_files(folder: Path) -> None:
    path = folder / "tokenizer.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="tokenizer.json is not valid JSON"):
        Tokenizer.from_folder(folder, 4096)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a JSON list, an object"):
        Tokenizer.from_folder(folder, 4096)
    path.write_text('{"model": {"type": "Unheard"}, "decoder": {"type": "ByteLevel"}}')
    with pytest.raises(CheckpointError, match="not a tokenizer that the tokenizers library reads"):
        Tokenizer.from_folder(folder, 4096)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_folder(folder, 4096)
    path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        Tokenizer.from_folder(folder, 4096)


def test_other_decoders_are_refused(folder: Path) -> None:
    edit(folder / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(CheckpointError, match="decoder 'Fuse'"):
        Tokenizer.from_folder(folder, 4096)


def test_named_token_must_exist(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<|gone|>")
    with pytest.raises(CheckpointError, match="names '<|gone|>' as eos_token"):
        Tokenizer.from_folder(folder, 4096)


def test_named_token_may_be_an_object(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|endoftext|>", "special": True})
    assert Tokenizer.from_folder(folder, 4096).eos_id == 4087


def test_config_may_add_tokens_but_not_contradict(folder: Path) -> None:
    declared = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    extra = {"4096": {"content": "<extra>", "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=declared | extra)
    tokenizer = Tokenizer.from_folder(folder, 4100)
    assert tokenizer.encode("a<extra>") == [*tokenizer.encode("a"), 4096]
    assert 4096 in tokenizer.special_ids
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"4092": {"content": "<other>"}})
    with pytest.raises(CheckpointError, match="token id 4092 is '<tool_call>' .* but '<other>'"):
        Tokenizer.from_folder(folder, 4096)


def test_an_added_token_that_is_also_a_word_is_refused(folder: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    added = definition["added_tokens"]
    word = next(word for word in map(LIBRARY.id_to_token, range(1000, 4000)) if word.isascii() and word.isalpha())
    entry = added[0] | {"id": LIBRARY.token_to_id(word), "content": word}
    edit(folder / "tokenizer.json", added_tokens=[*added, entry])
    with pytest.raises(CheckpointError, match=f"the added token '{word}' is a word of the ordinary vocabulary too"):
        Tokenizer.from_folder(folder, 4096)


def test_template_places(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(folder, 4096).chat_template is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.from_folder(folder, 4096).chat_template == "D"
    edit(folder / "tokenizer_config.json", chat_template="plain")
    assert Tokenizer.from_folder(folder, 4096).chat_template == "plain"
    (folder / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert Tokenizer.from_folder(folder, 4096).chat_template == "from json"
    (folder / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="chat_template.json: chat_template is a int"):
        Tokenizer.from_folder(folder, 4096)


def test_without_a_config_file(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder, 4096)
    assert tokenizer.eos_id is None and tokenizer.special_ids == {4087, 4088, 4089}
