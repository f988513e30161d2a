"""Token ids to text while they arrive: no piece ends inside a character, and the pieces join to the decoded whole."""

import codecs
from collections.abc import Iterable

from deltaloom.runtime.tokenizer import Tokenizer


class StreamDecoder:
    """Incremental `Tokenizer.decode`: bytes of an unfinished UTF-8 character are held back until it is complete.

    The concatenation of everything that `push` and `flush` return equals ``tokenizer.decode`` of all ids, however the
    ids are split. Each token's bytes are looked at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete, perhaps empty. Raises RequestError for an id without a token."""
        visible = self._tokenizer.visible_ids(ids, self._skip_special_tokens)
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, visible)))

    def flush(self) -> str:
        """What is held back, at the end: U+FFFD for a character that never became complete, else nothing."""
        return self._decoder.decode(b"", final=True)
