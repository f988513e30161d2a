"""The tokenizer of a checkpoint: ``tokenizer.json`` read by the tokenizers library, and rules of safe use around it.

Two library objects are kept: the checkpoint's own, and a second one built from the same JSON without its added tokens.
The second spells ``<|im_end|>`` or ``<tool_call>`` out as ordinary text, so that what a user types never becomes a
control token. (Qwen3-Next specification, section 12.)
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from deltaloom.graph.errors import CheckpointError, RequestError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

JsonObject = dict[str, object]


class Tokenizer:
    """Text to token ids and back, for byte-level BPE vocabularies.

    ``vocab_size`` is the number of ids that the tokenizer knows (largest id plus one); a model may have more rows.
    """

    def __init__(self, definition: JsonObject, config: JsonObject, chat_template: str | None, source: str) -> None:
        """``definition`` and ``config``: contents of tokenizer.json and tokenizer_config.json; ``source``: folder."""
        self.source = source
        self.chat_template = chat_template
        added = _merged_added_tokens(definition, config, source)
        self._library = _library_tokenizer({**definition, "added_tokens": added}, source)
        self._plain = _library_tokenizer({**definition, "added_tokens": []}, source)
        self.added_tokens: dict[str, int] = {str(entry["content"]): _as_id(entry["id"], source) for entry in added}
        self._added_ids = frozenset(self.added_tokens.values())
        self._named = {name: _token_text(config.get(name)) for name in NAMED_TOKENS}
        self._special_ids = self._find_special_ids(added, config)
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._bytes = _token_bytes(vocabulary, self.added_tokens)
        self._check(definition)

    @classmethod
    def from_folder(cls, path: str | Path, vocab_size: int) -> "Tokenizer":
        """Read the tokenizer of the checkpoint folder ``path``, whose model has ``vocab_size`` rows in its embedding.

        Raises CheckpointError for a missing, broken or unsupported tokenizer, or one with more ids than the model has
        rows.
        """
        folder = Path(path)
        definition = _read_json(folder / TOKENIZER_FILE, required=True)
        config = _read_json(folder / TOKENIZER_CONFIG_FILE, required=False)
        tokenizer = cls(definition, config, _read_chat_template(folder, config), str(folder))
        if tokenizer.vocab_size > vocab_size:
            raise CheckpointError(
                f"{folder / TOKENIZER_FILE} has the wrong vocabulary: the tokenizer has {tokenizer.vocab_size} ids, "
                f"the model has {vocab_size} vocabulary rows; use the tokenizer that belongs to these weights"
            )
        return tokenizer

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a turn, None if the configuration names none."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, None if the configuration names none."""
        return self._named_id("pad_token")

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, None if the configuration names none; `encode` never adds it."""
        return self._named_id("bos_token")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out; ``<tool_call>`` and its like are not among them."""
        return self._special_ids

    @property
    def named_tokens(self) -> dict[str, str]:
        """The texts of those of bos_token, eos_token, pad_token and unk_token that the configuration names."""
        return {name: text for name, text in self._named.items() if text is not None}

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Token ids of ``text``; nothing is put before or after it.

        With ``allow_special=False`` an added token's text is encoded as ordinary text. Raises RequestError for text
        that is not Unicode (a lone surrogate).
        """
        library = self._library if allow_special else self._plain
        ids: list[int] = library.encode(_unicode(text), add_special_tokens=False).ids
        return ids

    def added_token_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Where `encode` finds added tokens in ``text``: (first character, character after the last, id), in order."""
        encoding = self._library.encode(_unicode(text), add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [(start, stop, token) for token, (start, stop) in pairs if token in self._added_ids]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. Raises RequestError for an unknown id."""
        return b"".join(map(self.token_bytes, self.visible_ids(ids, skip_special_tokens))).decode("utf-8", "replace")

    def visible_ids(self, ids: Iterable[int], skip_special_tokens: bool) -> list[int]:
        """``ids`` without the special ones if these are to be skipped."""
        return [token for token in ids if not (skip_special_tokens and token in self._special_ids)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that token id ``token`` stands for. Raises RequestError if the id has no token."""
        found = self._bytes.get(token)
        if found is None:
            raise RequestError(
                f"token id {token} has no text: the tokenizer of {self.source} has ids 0 to {self.vocab_size - 1} "
                "(further rows of the model's vocabulary are padding)"
            )
        return found

    def token_to_id(self, token: str) -> int | None:
        """Id of a token in the vocabulary's own spelling, None if there is none."""
        found: int | None = self._library.token_to_id(token)
        return found

    def id_to_token(self, token: int) -> str | None:
        """A token in the vocabulary's own spelling, None if the id has none."""
        found: str | None = self._library.id_to_token(token) if 0 <= token < self.vocab_size else None
        return found

    def _named_id(self, name: str) -> int | None:
        text = self._named[name]
        return None if text is None else self.token_to_id(text)

    def _find_special_ids(self, added: Sequence[JsonObject], config: JsonObject) -> frozenset[int]:
        extra = config.get("additional_special_tokens")
        names = {_token_text(entry) for entry in extra} if isinstance(extra, list) else set()
        names.update(self._named.values())
        chosen = [entry for entry in added if entry["special"] or entry["content"] in names]
        return frozenset(_as_id(entry["id"], self.source) for entry in chosen)

    def _check(self, definition: JsonObject) -> None:
        decoder = definition.get("decoder")
        kind = decoder.get("type") if isinstance(decoder, dict) else None
        if kind != "ByteLevel":
            raise CheckpointError(
                f"{self.source}/{TOKENIZER_FILE} has the decoder {kind!r}; only byte-level vocabularies (decoder "
                "'ByteLevel') are supported"
            )
        for name, text in self.named_tokens.items():
            if self.token_to_id(text) is None:
                raise CheckpointError(
                    f"{self.source}/{TOKENIZER_CONFIG_FILE} names {text!r} as {name}, but {TOKENIZER_FILE} has no such "
                    "token"
                )
        for text in self.added_tokens:
            if not self._added_ids.isdisjoint(self.encode(text, allow_special=False)):
                raise CheckpointError(
                    f"{self.source}/{TOKENIZER_FILE}: the added token {text!r} is a word of the ordinary vocabulary "
                    "too, so typed text could not be told from the control token; remove it from model.vocab or from "
                    "added_tokens"
                )


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: a lone surrogate {text[error.start]!r} at character {error.start}; send "
            "text that can be written as UTF-8"
        ) from None
    return text


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of bytes: printable Latin-1 characters as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {**alphabet, **{chr(0x100 + rank): byte for rank, byte in enumerate(list(others))}}


def _token_bytes(vocabulary: Mapping[str, int], added: Mapping[str, int]) -> dict[int, bytes]:
    alphabet = byte_alphabet()
    table: dict[int, bytes] = {}
    for token, number in vocabulary.items():
        if token in added or any(char not in alphabet for char in token):
            table[number] = token.encode("utf-8")
        else:
            table[number] = bytes(alphabet[char] for char in token)
    return table


def _library_tokenizer(definition: JsonObject, source: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{source}/{TOKENIZER_FILE} is not a tokenizer that the tokenizers library reads: {error}"
        ) from None
    library.no_truncation()
    library.no_padding()
    return library


def _merged_added_tokens(definition: JsonObject, config: JsonObject, source: str) -> list[JsonObject]:
    """The added tokens of tokenizer.json and those that only tokenizer_config.json knows, by id."""
    listed = definition.get("added_tokens") or []
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(declared, dict):
        raise CheckpointError(
            f"{source}: added_tokens must be a list in {TOKENIZER_FILE} and added_tokens_decoder an object in "
            f"{TOKENIZER_CONFIG_FILE}"
        )
    found: dict[int, JsonObject] = {}
    for number, entry in [*((None, entry) for entry in listed), *declared.items()]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise CheckpointError(f"{source}: the added token {entry!r} has no text under 'content'")
        token = _as_id(entry.get("id") if number is None else number, source)
        flags = {flag: bool(entry.get(flag, False)) for flag in ADDED_TOKEN_FLAGS}
        known = found.setdefault(token, {"id": token, "content": entry["content"], **flags})
        if known["content"] != entry["content"]:
            raise CheckpointError(
                f"{source}: token id {token} is {known['content']!r} in {TOKENIZER_FILE} but {entry['content']!r} in "
                f"{TOKENIZER_CONFIG_FILE}; the two files do not belong together"
            )
    return [found[token] for token in sorted(found)]


def _as_id(value: object, source: str) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise CheckpointError(f"{source}: an added token has the id {value!r}, which is not a number from 0 up")


def _token_text(value: object) -> str | None:
    """A token is named by its text or by an object that has it under ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_json(path: Path, *, required: bool) -> JsonObject:
    text = _read_text(path, required=required)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, an object was expected")
    return content


def _read_text(path: Path, *, required: bool) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not required:
            return None
        raise CheckpointError(
            f"{path} is missing; a checkpoint needs its {path.name} to turn text into tokens (vocab.json with "
            "merges.txt is not read: save the tokenizer in the 'fast' form)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _read_chat_template(folder: Path, config: JsonObject) -> str | None:
    """The template in chat_template.jinja, else chat_template.json, else tokenizer_config.json, else None."""
    text = _read_text(folder / "chat_template.jinja", required=False)
    if text is not None:
        return text
    path = folder / "chat_template.json"
    template = _read_json(path, required=False).get("chat_template")
    if template is None:
        path = folder / TOKENIZER_CONFIG_FILE
        template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; 'default' is the one for conversations
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is None or isinstance(template, str):
        return template
    raise CheckpointError(
        f"{path}: chat_template is a {type(template).__name__}, a text or a list of named texts was expected"
    )
