"""When an output ends and how much of its text may already be shown.

A text ends at a token that ends it (an eos id or a stop id), at a stop string, or at ``max_tokens``. Text that may turn
out to be the beginning of a stop string is held back until that is decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.detokenize import StreamDecoder
from deltaloom.runtime.params import ResolvedParams
from deltaloom.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class StopStrings:
    """Looks for stop strings in a stream of text; the result does not depend on how the stream is split.

    The stop string that is complete first wins; of several complete at the same character, the one that began first.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """``stops``: non-empty texts. ``include``: whether the found stop string is part of the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown now. Nothing comes after a stop string was found (``matched`` is then set)."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        border = len(text) - self._undecided(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True)
class TextStep:
    """What one token added: new text to show, and at the end why it ended (``stop_reason``: the stop string or id)."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class OutputText:
    """The text of one sample while its tokens arrive.

    Stop strings are looked for in the text of the tokens after the first ``min_tokens``. A token that ends the text
    counts as a token but adds no text unless ``include_stop_str_in_output`` asks for it.
    """

    def __init__(self, tokenizer: Tokenizer, params: ResolvedParams) -> None:
        self._params = params
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._end_ids = frozenset(params.end_ids)
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, token: int) -> TextStep:
        """Take one sampled token id. Raises RequestError for an id without a token, or after the end."""
        if self.finish_reason is not None:
            raise RequestError(f"this output has ended ({self.finish_reason}); token {token} cannot be added to it")
        self.tokens += 1
        watched = self.tokens > self._params.min_tokens
        if watched and token in self._end_ids:
            last = [token] if self._params.include_stop_str_in_output else []
            return self._ended(self._decoder.push(last), "stop", token)
        text = self._decoder.push([token])
        if self.tokens == self._params.max_tokens:
            return self._ended(text, "length")
        if watched:
            text = self._stops.push(text)
        if self._stops.matched is None:
            return TextStep(text)
        self.finish_reason = "stop"
        return TextStep(text, "stop", self._stops.matched)

    def close(self) -> str:
        """End the output from outside (context full, request cancelled) and return the text that was held back."""
        return "" if self.finish_reason is not None else self._ended("", "length").text

    def _ended(self, text: str, reason: FinishReason, token: int | None = None) -> TextStep:
        text += self._decoder.flush()
        if self.tokens > self._params.min_tokens:
            text = self._stops.push(text)
        if self._stops.matched is not None:
            self.finish_reason = "stop"
            return TextStep(text, "stop", self._stops.matched)
        self.finish_reason = reason
        return TextStep(text + self._stops.flush(), reason, token)
