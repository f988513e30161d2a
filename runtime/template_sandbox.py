"""Jinja in a cage: a template from a checkpoint can neither reach Python nor use up time or memory.

Jinja's own sandbox keeps templates away from Python's internals. What it leaves open is closed here: each pass of a loop, each
macro and each call looks at the clock; every operator, method and filter that can make a large value out of small ones asks
beforehand how large the result will be; and output is collected piece by piece under a cap.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deltaloom.graph.errors import RequestError

MAX_NUMBER_BITS = 4096
MAX_PADDING = 1000
PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs")
FORMAT_METHODS = ("format", "format_map")


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may use: ``characters`` in any single value and in the output, ``seconds`` in all."""

    characters: int = 16_000_000
    seconds: float = 5.0


class LimitExceeded(Exception):
    """A template went beyond its limits; the message says which."""


@dataclass(frozen=True)
class _Allowance:
    limits: TemplateLimits
    deadline: float


_allowance: ContextVar[_Allowance] = ContextVar("deltaloom_template_allowance")


def render_template(source: str, variables: Mapping[str, object], limits: TemplateLimits) -> str:
    """The text that the Jinja template ``source`` makes of ``variables``. Raises RequestError for whatever goes wrong."""
    token = _allowance.set(_Allowance(limits, time.monotonic() + limits.seconds))
    try:
        return _collect(_compiled(source).generate(dict(variables)), limits)
    except LimitExceeded as error:
        raise RequestError(f"the chat template was stopped: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses this conversation: {error}") from None
    except RecursionError:
        raise RequestError("the chat template was stopped: it calls itself, or its values are nested, too deep") from None
    except MemoryError:
        raise RequestError("the chat template was stopped: it ran out of memory") from None
    except Exception as error:  # a template can raise whatever its filters and operators raise
        kind = type(error).__name__
        raise RequestError(f"the chat template cannot be applied to this conversation: {kind}: {error}") from None
    finally:
        _allowance.reset(token)


def _collect(pieces: Iterator[str], limits: TemplateLimits) -> str:
    collected: list[str] = []
    size = 0
    for piece in pieces:
        _tick()
        size += len(piece)
        if size > limits.characters:
            raise LimitExceeded(f"its output is longer than {limits.characters} characters")
        collected.append(piece)
    return "".join(collected)


def _tick() -> bool:
    allowance = _allowance.get()
    if time.monotonic() > allowance.deadline:
        raise LimitExceeded(f"it took longer than {allowance.limits.seconds:g} seconds")
    return True


def _claim(size: int) -> None:
    """Refuse a value of ``size`` characters or items that is larger than the limit."""
    limit = _allowance.get().limits.characters
    if size > limit:
        raise LimitExceeded(f"a value in it would have more than {limit} characters or items")


def _weight(value: object) -> int:
    """About how many characters ``value`` has as text; looks no further than the limit."""
    limit = _allowance.get().limits.characters
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


class _CagedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a clock and with sizes asked for beforehand."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_finalize)
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters["tojson"] = _tojson
        for name, claim in FILTER_CLAIMS.items():
            self.filters[name] = _claiming(self.filters[name], claim)

    def tick(self) -> bool:
        """Look at the clock; compiled templates call this."""
        return _tick()

    def concatenate(self, *values: object) -> str:
        """The ``~`` operator."""
        _claim(sum(map(_weight, values)))
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _claim(len(left) + len(right))
        elif operator == "*":
            _claim_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _claim_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _claim_format(left, (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        _tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            _claim_method(owner, name, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        _tick()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        _tick()
        return super().call_test(*args, **kwargs)
