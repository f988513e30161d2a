"""Jinja in a cage: a template from a checkpoint can neither reach Python nor use up time or memory.

Jinja's own sandbox keeps templates away from Python's internals. What it leaves open is closed here: each pass of a
loop, each macro and each call looks at the clock; every operator, method and filter that can make a large value out of
small ones is asked beforehand how large its result will be; and output is collected piece by piece under a cap.
"""

import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.template_filters import FILTERS, GLOBALS, REMOVED_FILTERS, REMOVED_GLOBALS
from deltaloom.runtime.template_limits import (
    Allowance,
    LimitExceeded,
    TemplateLimits,
    allowance,
    claim,
    claim_bits,
    claim_method,
    claim_percent_format,
    tick,
    weight,
)

BLOCKED_METHODS = frozenset({"translate", "maketrans", "encode", "to_bytes", "from_bytes"})


def render_template(source: str, variables: Mapping[str, object], limits: TemplateLimits) -> str:
    """The text that the Jinja template ``source`` makes of ``variables``. Raises RequestError for any failure."""
    token = allowance.set(Allowance(limits, time.monotonic() + limits.seconds))
    try:
        return _collect(_compiled(source).generate(dict(variables)), limits)
    except LimitExceeded as error:
        raise RequestError(f"the chat template was stopped: {error}") from None
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refuses this conversation: {error}") from None
    except RecursionError:
        message = "the chat template was stopped: it calls itself, or its values are nested, too deep"
        raise RequestError(message) from None
    except MemoryError:
        raise RequestError("the chat template was stopped: it ran out of memory") from None
    except Exception as error:  # filters and operators of a template can raise anything
        kind = type(error).__name__
        raise RequestError(f"the chat template cannot be applied to this conversation: {kind}: {error}") from None
    finally:
        allowance.reset(token)


def _collect(pieces: Iterator[str], limits: TemplateLimits) -> str:
    collected: list[str] = []
    size = 0
    for piece in pieces:
        tick()
        size += len(piece)
        if size > limits.characters:
            raise LimitExceeded(f"its output is longer than {limits.characters} characters")
        collected.append(piece)
    return "".join(collected)


class _CagedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a clock and with sizes asked for beforehand."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_finalize)
        for name in REMOVED_GLOBALS:
            self.globals.pop(name, None)
        for name in REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.globals.update(GLOBALS)
        self.filters.update(FILTERS)

    def tick(self) -> bool:
        """Look at the clock; called from the loops and macros of every compiled template."""
        return tick()

    def concatenate(self, *values: object) -> str:
        """The ``~`` operator."""
        claim(sum(map(weight, values)))
        return "".join(map(str, values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in BLOCKED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        tick()
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            claim(len(left) + len(right))
        elif operator == "*":
            _claim_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            claim_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            claim_percent_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        wrapped = getattr(obj, "__wrapped__", None)  # the sandbox's own form of str.format
        owner = getattr(wrapped, "__self__", None) if owner is None else owner
        if isinstance(owner, str):
            args = claim_method(owner, name, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        tick()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        tick()
        return super().call_test(*args, **kwargs)


def _finalize(value: object) -> object:
    """Applied to each printed value: a nested list is measured before it is turned into text."""
    if not isinstance(value, str | int | float):
        claim(weight(value))
    return value


def _claim_product(left: object, right: object) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            claim(len(value) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int):
        claim_bits(left.bit_length() + right.bit_length())


class _ClockInserter(NodeTransformer):
    """Puts a look at the clock into loops and macros, and sends ``~`` through `_CagedEnvironment.concatenate`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node.lineno))
        if node.test is not None:
            node.test = nodes.And(_environment_call("tick", [], node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node.lineno))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _tick_statement(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("concatenate", node.nodes, node.lineno)


def _environment_call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)


def _tick_statement(line: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_environment_call("tick", [], line), lineno=line)


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    environment = _CagedEnvironment()
    tree = environment.parse(source)
    tree = _ClockInserter().visit(tree)
    tree.set_environment(environment)
    return environment.template_class.from_code(
        environment, environment.compile(tree, filename="<chat template>"), environment.make_globals(None)
    )
