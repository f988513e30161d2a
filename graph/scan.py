"""Scanning one line of a graph text: words, values, types and attribute literals, with errors that show the place."""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from deltaloom.graph.dims import Symbol
from deltaloom.graph.errors import GraphError
from deltaloom.graph.op import Attribute
from deltaloom.graph.text import KEYWORDS, WORD
from deltaloom.graph.types import TensorType, parse_type

T = TypeVar("T")
REFERENCE = re.compile(r"[%@$][\w./-]+")
TYPE = re.compile(r"\w+(\{[^}]*\})?\[[^\]]*\]")
STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
CONSTANT = re.compile(r"True|False|None|-?inf")
SHARDING = re.compile(r"\{[^{}]*\}")


class Line:
    """A line and the position reached in it; blanks between tokens are skipped."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        self.text = text.rstrip()
        self.indent = len(text) - len(text.lstrip(" "))
        self._at = self.indent

    def fail(self, message: str) -> NoReturn:
        """Raise with the line and a mark under the place reached."""
        raise GraphError(f"line {self.number}: {message}\n  {self.text}\n  {' ' * self._at}^")

    def found(self, pattern: str | re.Pattern[str]) -> str | None:
        """The text that ``pattern`` matches here, taken; None, and nothing taken, where it does not match."""
        self._skip()
        match = re.compile(pattern).match(self.text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match.group()

    def take(self, literal: str) -> bool:
        """Take ``literal`` if it comes next; one of letters must end where it ends."""
        return self.found(re.escape(literal) + (r"(?![^\s,#\"'(){}\[\]=])" if literal[-1].isalnum() else "")) is not None

    def ahead(self, literal: str) -> bool:
        """Whether ``literal`` comes next; nothing is taken."""
        start = self._at
        found = self.take(literal)
        self._at = start
        return found

    def expect(self, literal: str) -> None:
        """Take ``literal`` or fail."""
        if not self.take(literal):
            self.fail(f"expected '{literal}'")

    def end(self) -> None:
        """Fail unless the line ends here."""
        self._skip()
        if self._at < len(self.text):
            self.fail("nothing more was expected on this line")

    def ended(self) -> bool:
        """Whether the line ends here."""
        self._skip()
        return self._at == len(self.text)

    def word(self, what: str) -> str:
        """A bare word or a quoted one."""
        self._skip()
        if self.text.startswith('"', self._at):
            return self.quoted(what)
        start = self._at
        found = self.found(WORD)
        if found is None or found in KEYWORDS:
            self._at = start
            self.fail(f"expected {what}")
        return found

    def quoted(self, what: str) -> str:
        """A text in double quotes, as JSON writes it."""
        start = self._at
        found = self.found(STRING)
        try:
            text = json.loads(found or "")
        except ValueError:
            text = None
        if not isinstance(text, str):
            self._at = start
            self.fail(f"expected {what} in double quotes")
        return text

    def integer(self, what: str) -> int:
        """An integer."""
        found = self.found(r"-?\d+")
        if found is None:
            self.fail(f"expected {what}")
        return int(found)

    def reference(self) -> str:
        """A value with its sigil: ``%x``."""
        found = self.found(REFERENCE)
        if found is None:
            self.fail("expected a value such as %x, @weight or $state")
        return found

    def type(self, symbols: Mapping[str, Symbol]) -> TensorType:
        """A type such as ``f32[batch, 4]``."""
        start = self._at
        found = self.found(TYPE)
        if found is None:
            self.fail("expected a type such as f32[batch, 4]")
        try:
            return parse_type(found, symbols)
        except GraphError as error:
            self._at = start
            self.fail(str(error))

    def sharding(self) -> str:
        """What stands in braces after a type; nothing where there are none."""
        return "" if (found := self.found(SHARDING)) is None else found[1:-1]

    def literal(self) -> Attribute:
        """An attribute's value: a number, a string, True, False, None or a tuple of these."""
        if self.take("("):
            return tuple(self.items(self.literal, ")"))
        for pattern in (STRING, NUMBER):
            if (found := self.found(pattern)) is not None:
                value: Attribute = literal_eval(found)
                return value
        found = self.found(CONSTANT)
        if found is None:
            self.fail("expected a number, a string, True, False, None or a tuple")
        return float(found) if found.endswith("inf") else literal_eval(found)

    def items(self, read: Callable[[], T], close: str) -> list[T]:
        """What ``read`` reads, separated by commas, up to ``close``; a comma may stand before it."""
        found: list[T] = []
        while not self.take(close):
            if found:
                self.expect(",")
                if self.take(close):
                    break
            found.append(read())
        return found

    def _skip(self) -> None:
        while self._at < len(self.text) and self.text[self._at] == " ":
            self._at += 1
