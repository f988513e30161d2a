"""The filters and functions of chat templates that Jinja lacks, does otherwise, or does without regard to size."""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime

import jinja2
from jinja2 import Environment, filters, pass_environment

from deltaloom.runtime.template_limits import (
    LimitExceeded,
    claim,
    claim_percent_format,
    claim_replacement,
    claim_width,
    tick,
    weight,
)

REMOVED_GLOBALS = ("lipsum", "cycler", "joiner")
REMOVED_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr", "filesizeformat")


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as json.dumps writes it. Jinja's own filter escapes HTML and other alphabets, which changes prompts."""
    claim(weight(value))
    claim_width(len(indent) if isinstance(indent, str) else indent)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=True
    )
    if indent is None:
        return encoder.encode(value)
    pieces: list[str] = []
    for piece in encoder.iterencode(value):  # indentation can outgrow the value itself
        tick()
        claim(len(piece))
        pieces.append(piece)
    return "".join(pieces)


@pass_environment
def join(environment: Environment, value: Iterable[object], d: object = "", attribute: str | int | None = None) -> str:
    """The items' texts with ``d`` between them."""
    if attribute is not None:
        value = map(filters.make_attrgetter(environment, attribute), value)
    items, separator = list(value), str(d)
    claim(weight(items) + len(separator) * len(items))
    return separator.join(map(str, items))


def replace(value: object, old: object, new: object, count: int | None = None) -> str:
    """Text with ``old`` replaced by ``new``, at most ``count`` times."""
    text = string(value)
    claim_replacement(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


def string(value: object) -> str:
    """The value as text."""
    claim(weight(value))
    return str(value)


def indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Text with each line indented; the first and blank ones only if asked."""
    text = string(value)
    claim_width(len(width) if isinstance(width, str) else width)
    claim(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width)))
    return filters.do_indent(text, width, first, blank)


def center(value: object, width: int = 80) -> str:
    """Text in the middle of ``width`` characters."""
    claim_width(width)
    return string(value).center(width)


def percent_format(value: object, *args: object, **kwargs: object) -> str:
    """Text with its ``%`` places filled."""
    text = string(value)
    claim_percent_format(text, kwargs or args)
    return text % (kwargs or args)


def total(value: Iterable[float], attribute: str | None = None, start: float = 0) -> float:
    """The sum of numbers."""
    items = list(value)
    if attribute is not None or not all(isinstance(entry, int | float) for entry in [start, *items]):
        raise jinja2.TemplateRuntimeError("the filter 'sum' adds numbers only; select the attribute with 'map' before")
    return sum(items, start)


def rounded(value: float, precision: int = 0, method: str = "common") -> float:
    """A number rounded to ``precision`` decimals."""
    claim_width(precision)
    if method not in ("common", "ceil", "floor"):
        raise jinja2.TemplateRuntimeError("the filter 'round' knows the methods common, ceil and floor")
    return filters.do_round(value, precision, method)  # type: ignore[arg-type]


def batch(value: Iterable[object], linecount: int, fill_with: object = None) -> list[list[object]]:
    """The items in lists of ``linecount``, the last one filled up."""
    claim(linecount)
    return list(filters.do_batch(value, linecount, fill_with))


def truncate(value: object, length: int = 255, killwords: bool = False, end: str = "...", leeway: int = 0) -> str:
    """Text cut to ``length`` characters, ``end`` included, at a word unless ``killwords``."""
    text = string(value)
    if len(text) <= length + leeway:
        return text
    cut = text[: max(length - len(end), 0)]
    return (cut if killwords else cut.rsplit(" ", 1)[0]) + end


def raise_exception(message: object) -> str:
    """How templates refuse a conversation."""
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    """The present local time in a strftime form."""
    if len(form) > 200 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitExceeded("it asks for a date in an overlong form")
    return datetime.now().strftime(form)


FILTERS: dict[str, Callable[..., object]] = {
    "tojson": tojson,
    "join": join,
    "replace": replace,
    "string": string,
    "indent": indent,
    "center": center,
    "format": percent_format,
    "sum": total,
    "round": rounded,
    "batch": batch,
    "truncate": truncate,
}
GLOBALS: dict[str, Callable[..., object]] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
