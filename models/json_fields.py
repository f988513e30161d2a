"""A checkpoint's JSON files and typed look-ups in them; each refusal names field, finding and expectation."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltaloom.graph.errors import CheckpointError, ConfigError, DeltaloomError

LARGEST_INTEGER = 2**53  # JSON numbers beyond this do not survive a reader that uses doubles


def read_json_object(
    path: Path, error: type[CheckpointError] | type[ConfigError] = CheckpointError
) -> dict[str, object]:
    """The one JSON object in the UTF-8 file ``path``.

    Raises CheckpointError if the file is missing or unreadable, ``error`` if its content is not one JSON object
    or if a key occurs twice in one object of it.
    """
    data = read_bytes(path)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=object_without_duplicates)
    except DuplicateKey as duplicate:
        raise error(f"{path} has the key {str(duplicate)!r} twice in one object; keep one of them.") from None
    except RecursionError:
        raise error(f"{path} nests JSON deeper than can be read; expected a flat object of fields.") from None
    except ValueError as problem:
        raise error(f"{path} is not valid JSON ({problem}); copy the file again.") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds {describe(value)}; expected one JSON object.")
    return value


def read_bytes(path: Path) -> bytes:
    """The whole file; CheckpointError if it is missing, a folder, or may not be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read: {reason(problem)}.") from None


def reason(problem: OSError | ValueError) -> str:
    """What the system said, without the path that the caller's sentence names already."""
    return (problem.strerror or str(problem)) if isinstance(problem, OSError) else str(problem)


def describe(value: object) -> str:
    """A JSON value as a person would name it, shortened: ``the string 'abc'``, ``null``, ``a list of 3``."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the string {value if len(value) <= 60 else value[:57] + '...'!r}"
        case int() if abs(value) >= 10**30:
            return "an integer of over 30 digits"
        case int() | float():
            return f"the number {value!r}"
        case list() | tuple():
            return f"a list of {len(value)}"
        case Mapping():
            return f"an object with {len(value)} fields"
        case _:
            return f"a value of type {type(value).__name__}"


class DuplicateKey(ValueError):
    """A key that occurs twice in one JSON object; its text is the key."""


def object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For ``json.loads(object_pairs_hook=...)``: a dict, or DuplicateKey where JSON would keep the last of two."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKey(next(name for name in names if names.count(name) > 1))
    return result


@dataclass(frozen=True)
class Fields:
    """Typed look-ups in one JSON object. An absent field gives the default, one of the wrong kind a ConfigError.

    ``prefix`` is put before names in messages (``rope_parameters.``). In the ``optional_`` forms null means absent.
    """

    values: Mapping[str, object]
    prefix: str = ""

    def integer(self, name: str, default: int, *, minimum: int = 1, maximum: int = LARGEST_INTEGER) -> int:
        if name not in self.values:
            return default
        return self._integer(name, self.values[name], minimum, maximum)

    def optional_integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        return default if self.values.get(name) is None else self.integer(name, 0, minimum=minimum)

    def number(
        self,
        name: str,
        default: float,
        *,
        above: float = -math.inf,
        minimum: float = -math.inf,
        maximum: float = math.inf,
    ) -> float:
        if name not in self.values:
            return default
        value = self.values[name]
        limits = _limits(above, minimum, maximum)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(name, value, f"a number{limits}")
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if not math.isfinite(result) or not (result > above and minimum <= result <= maximum):
            raise self.refusal(name, value, f"a finite number{limits}")
        return result

    def optional_number(self, name: str, *, above: float = -math.inf, minimum: float = -math.inf) -> float | None:
        return None if self.values.get(name) is None else self.number(name, 0.0, above=above, minimum=minimum)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str):
            raise self.refusal(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings; None if the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.refusal(name, value, "a list of strings")
        for position, entry in enumerate(value):
            if not isinstance(entry, str):
                raise self.refusal(f"{name}[{position}]", entry, "a string")
        return tuple(value)

    def integers(self, name: str, *, minimum: int = 0) -> tuple[int, ...] | None:
        """A list of integers, or one integer alone; None if the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            return (self._integer(name, value, minimum, LARGEST_INTEGER, or_list=True),)
        return tuple(
            self._integer(f"{name}[{position}]", entry, minimum, LARGEST_INTEGER)
            for position, entry in enumerate(value)
        )

    def mapping(self, name: str) -> dict[str, object] | None:
        """An object; None if the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.refusal(name, value, "an object or null")
        return dict(value)

    def refusal(self, name: str, value: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.prefix}{name} is {describe(value)}; expected {expected}.")

    def _integer(self, name: str, value: object, minimum: int, maximum: int, or_list: bool = False) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            bound = f"of at least {minimum}" if maximum == LARGEST_INTEGER else f"from {minimum} to {maximum}"
            raise self.refusal(name, value, f"an integer {bound}{' or a list of them' if or_list else ''}")
        return value


def _limits(above: float, minimum: float, maximum: float) -> str:
    parts = []
    if above > -math.inf:
        parts.append(f"above {above:g}")
    if minimum > -math.inf:
        parts.append(f"of at least {minimum:g}")
    if maximum < math.inf:
        parts.append(f"of at most {maximum:g}")
    return " " + " and ".join(parts) if parts else ""


def as_path(source: str | os.PathLike[str], error: type[DeltaloomError] = ConfigError) -> Path:
    """``source`` as a path; ``error`` for text that no file system can hold."""
    text = os.fspath(source)
    if "\0" in text:
        raise error(f"the path {text!r} holds a zero byte; expected a path.")
    return Path(text)
