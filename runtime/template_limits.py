"""What one rendering of a template may use, and how sizes are known before values are made."""

import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

MAX_NUMBER_BITS = 4096
MAX_WIDTH = 1000
TOTAL_FACTOR = 8
PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
PERCENT_WIDTHS = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\d+|\*)?(?:\.(\d+|\*))?")
BRACE_WIDTHS = re.compile(r"\{[^{}]*:([^{}]*)[{}]")


@dataclass(frozen=True)
class TemplateLimits:
    """Limits of one rendering: ``characters`` for any one value and for the output, ``seconds`` in all.

    All values that grow while rendering may have eight times ``characters`` together.
    """

    characters: int = 16_000_000
    seconds: float = 5.0


class LimitExceeded(Exception):
    """A template went beyond its limits; the message says which."""


@dataclass
class Allowance:
    """The limits of the rendering under way, when it must be done (monotonic clock), and what it has used."""

    limits: TemplateLimits
    deadline: float
    used: int = 0


allowance: ContextVar[Allowance] = ContextVar("deltaloom_template_allowance")


def tick() -> bool:
    """True while there is time. Raises LimitExceeded."""
    current = allowance.get()
    if time.monotonic() > current.deadline:
        raise LimitExceeded(f"it took longer than {current.limits.seconds:g} seconds")
    return True


def claim(size: int) -> None:
    """Ask for a value of ``size`` characters or items. Raises LimitExceeded."""
    current = allowance.get()
    limit = current.limits.characters
    if size > limit:
        raise LimitExceeded(f"one of its values would have more than {limit} characters or items")
    current.used += size
    if current.used > TOTAL_FACTOR * limit:
        raise LimitExceeded(f"its values have more than {TOTAL_FACTOR * limit} characters or items together")


def claim_bits(bits: int) -> None:
    """Ask for a whole number of ``bits`` bits. Raises LimitExceeded."""
    if bits > MAX_NUMBER_BITS:
        raise LimitExceeded(f"one of its numbers would have more than {MAX_NUMBER_BITS} bits")


def claim_width(width: object) -> None:
    """Ask for padding or indentation by ``width``. Raises LimitExceeded."""
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise LimitExceeded(f"it pads text to a width of more than {MAX_WIDTH} characters")


def weight(value: object) -> int:
    """About how many characters ``value`` has as text; looks no further than the limit."""
    limit = allowance.get().limits.characters
    total, waiting = 0, [value]
    while waiting and total <= limit:
        entry = waiting.pop()
        if isinstance(entry, str):
            total += len(entry)
        elif isinstance(entry, Mapping):
            total += 2 + 4 * len(entry)
            waiting.extend(entry.keys())
            waiting.extend(entry.values())
        elif isinstance(entry, list | tuple | set | frozenset):
            total += 2 + 2 * len(entry)
            waiting.extend(entry)
        elif isinstance(entry, int):
            total += 1 + entry.bit_length() // 3
        else:
            total += 8
    return total


def claim_replacement(text: str, old: object, new: object) -> None:
    """Ask for ``text.replace(old, new)``. Raises LimitExceeded."""
    if isinstance(old, str) and isinstance(new, str):
        claim(len(text) + text.count(old) * len(new))


def claim_percent_format(text: str, values: object) -> None:
    """Ask for ``text % values``. Raises LimitExceeded."""
    _claim_widths([width for pair in PERCENT_WIDTHS.findall(text) for width in pair])
    times = 1 if isinstance(values, tuple) else max(1, text.count("%("))
    claim(len(text) + weight(values) * times)


def claim_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Ask for calling the text's method ``name``; returns the arguments to call it with. Raises LimitExceeded."""
    if name == "replace":
        given = dict(zip(("old", "new"), args)) | dict(kwargs)
        claim_replacement(text, given.get("old"), given.get("new"))
    elif name in PADDING_METHODS:
        width = args[0] if args else kwargs.get("tabsize", 8)
        claim_width(width)
        claim(len(text) * (width if name == "expandtabs" and isinstance(width, int) else 1) + MAX_WIDTH)
    elif name == "join" and args:
        items = list(args[0])
        claim(len(text) * len(items) + weight(items))
        return (items, *args[1:])
    elif name in ("format", "format_map"):
        _claim_widths([width for spec in BRACE_WIDTHS.findall(text) for width in re.findall(r"\d+", spec)])
        if re.search(r":[^{}]*\{", text):
            raise LimitExceeded("it formats text with a width that is itself computed")
        claim(len(text) + weight([*args, *kwargs.values()]) * max(1, text.count("{")))
    return args


def _claim_widths(widths: list[str]) -> None:
    for width in widths:
        if width == "*":
            raise LimitExceeded("it formats text with a width that is itself computed")
        if width:
            claim_width(int(width[:6]))
