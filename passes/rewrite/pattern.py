"""Patterns: a rule's ``pattern`` method is run once on a ``PatternGraph``, which records what it calls as a small graph."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from itertools import product

import deltaloom.ops  # noqa: F401  (puts the built-in ops into the registry)
from deltaloom.graph.errors import CompileError
from deltaloom.graph.op import Attribute, Op
from deltaloom.graph.registry import OpRegistry, ops


@dataclass(frozen=True)
class Any:
    """In the place of an attribute, or of an element of one that is a tuple: binds what the node has to ``name``. Where a name
    stands twice, both must be equal."""

    name: str


Wanted = Attribute | Any | tuple[typing.Any, ...]
"""An attribute as a pattern has it: a value, ``Any``, or a tuple in which elements are ``Any``."""


@dataclass(frozen=True)
class Term:
    """A value of a pattern: its input ``label``, or output ``position`` of its node number ``maker``."""

    label: str
    maker: int | None = None
    position: int = 0


@dataclass(frozen=True)
class PatternNode:
    """An op that must be there, with all of its attributes."""

    op: type[Op]
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    attributes: Mapping[str, Wanted]


@dataclass(frozen=True)
class Step:
    """Where the search finds the next pattern node: as the maker of ``term``, or (``user``) among the readers of it."""

    node: int
    term: Term
    user: bool


@dataclass(frozen=True)
class Pattern:
    """A recorded pattern. ``absent`` are the optional inputs that it does without; the search begins with node ``root`` and
    goes on along ``steps``, which reach every other node."""

    inputs: tuple[Term, ...]
    absent: tuple[str, ...]
    nodes: tuple[PatternNode, ...]
    outputs: tuple[Term, ...]
    root: int
    steps: tuple[Step, ...]


class PatternGraph:
    """The ``g`` of a pattern: ``g.NAME(values..., attribute=...)``, or ``g.PLUGIN.NAME``, demands a node of that op. Attributes
    that are not given must have their defaults; one without default must be given, by ``Any`` at least. Trailing inputs that are
    None are left out."""

    def __init__(self, rule: str, registry: OpRegistry = ops) -> None:
        self._rule = rule
        self._registry = registry
        self._nodes: list[PatternNode] = []

    def __getattr__(self, name: str) -> typing.Any:
        return self._registry.attribute(name, lambda op: partial(self._demand, op))

    def _demand(self, op: type[Op], *inputs: Term | None, **attributes: Wanted) -> typing.Any:
        return self._record(op, given(inputs), attributes)

    def _record(self, op: type[Op], inputs: tuple[Term, ...], attributes: Mapping[str, Wanted]) -> typing.Any:
        wanted: dict[str, Wanted] = {}
        for field in fields(op):  # type: ignore[arg-type]
            default: typing.Any = field.default
            if field.name not in attributes and default is MISSING:
                raise CompileError(
                    f"the pattern of rule {self._rule} says nothing about attribute '{field.name}' of {op.name}, which has no "
                    f'default; give a value or Any("{field.name}")'
                )
            wanted[field.name] = attributes.get(field.name, default)
        if unknown := sorted(set(attributes) - set(wanted)):
            raise CompileError(f"the pattern of rule {self._rule} has an attribute '{unknown[0]}', which {op.name} has not")
        for value in inputs:
            if not isinstance(value, Term):
                raise CompileError(f"in the pattern of rule {self._rule}, {op.name} is given {value!r}, expected pattern values")
        number, count = len(self._nodes), _output_count(op, wanted)
        outputs = tuple(Term(op.name, number, position) for position in range(count))
        self._nodes.append(PatternNode(op, inputs, outputs, wanted))
        return outputs[0] if count == 1 else outputs


PatternMethod = Callable[..., typing.Any]


def record(rule: str, method: PatternMethod, root: str | None, registry: OpRegistry = ops) -> tuple[Pattern, ...]:
    """The patterns that ``method(g, *inputs)`` describes: one for every choice of the inputs that have the default None, the most
    complete first. The search begins at the first node whose op is ``root``, without it at the last node. Raises ``CompileError``
    for a pattern that cannot be matched."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    optional = [p.name for p in parameters if p.default is not inspect.Parameter.empty]
    found = []
    for choice in product((True, False), repeat=len(optional)):
        absent = tuple(name for name, there in zip(optional, choice, strict=True) if not there)
        g = PatternGraph(rule, registry)
        inputs = {p.name: Term(p.name) for p in parameters if p.name not in absent}
        outputs = method(g, *(inputs.get(p.name) for p in parameters))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        nodes = tuple(g._nodes)
        first = _root(rule, nodes, root)
        used = {term for node in nodes for term in node.inputs}
        if idle := [name for name, term in inputs.items() if term not in used]:
            raise CompileError(f"the pattern of rule {rule} does not use its input '{idle[0]}'")
        if any(term.maker is None for term in outputs):
            raise CompileError(f"the pattern of rule {rule} gives an input as output; only what it computes can be replaced")
        found.append(Pattern(tuple(inputs.values()), absent, nodes, outputs, first, _steps(rule, nodes, first)))
    return tuple(found)


def given(inputs: tuple[typing.Any, ...]) -> tuple[typing.Any, ...]:
    """``inputs`` without the None at their end: optional inputs that are absent."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs


def bound(wanted: Wanted, values: Mapping[str, Attribute]) -> Attribute:
    """The attribute that ``wanted`` stands for, its ``Any`` replaced by ``values``."""
    if isinstance(wanted, Any):
        return values[wanted.name]
    return tuple(bound(part, values) for part in wanted) if isinstance(wanted, tuple) else wanted


def _output_count(op: type[Op], wanted: Mapping[str, Wanted]) -> int:
    """As many as the op declares; a split has one for each size."""
    if op.name != "split":
        return len(op.outputs)
    sizes = wanted["sizes"]
    if not isinstance(sizes, tuple):
        raise CompileError(f'the sizes of a split in a pattern are a tuple, such as (Any("width"), 1), not {sizes!r}')
    return len(sizes)


def _root(rule: str, nodes: tuple[PatternNode, ...], root: str | None) -> int:
    if not nodes:
        raise CompileError(f"the pattern of rule {rule} is empty")
    if root is None:
        return len(nodes) - 1
    for number, node in enumerate(nodes):
        if node.op.name == root:
            return number
    raise CompileError(f"the pattern of rule {rule} has no {root}, which the rule names as its root")


def _steps(rule: str, nodes: tuple[PatternNode, ...], root: int) -> tuple[Step, ...]:
    """An order in which each node is a neighbour of one before it; makers first, because there is only one to try."""
    reached, steps = {root}, []
    while len(reached) < len(nodes):
        step = next(_makers(nodes, reached), None) or next(_users(nodes, reached), None)
        if step is None:
            raise CompileError(f"the pattern of rule {rule} falls into pieces that share no value")
        reached.add(step.node)
        steps.append(step)
    return tuple(steps)


def _makers(nodes: tuple[PatternNode, ...], reached: set[int]) -> Iterator[Step]:
    for number in sorted(reached, reverse=True):
        for term in nodes[number].inputs:
            if term.maker is not None and term.maker not in reached:
                yield Step(term.maker, term, user=False)


def _users(nodes: tuple[PatternNode, ...], reached: set[int]) -> Iterator[Step]:
    """Readers of what reached nodes compute, then of what they read: the values from outside have most readers."""
    made = [term for number in sorted(reached) for term in nodes[number].outputs]
    for term in (*made, *(term for number in sorted(reached) for term in nodes[number].inputs)):
        for number, node in enumerate(nodes):
            if number not in reached and term in node.inputs:
                yield Step(number, term, user=True)
