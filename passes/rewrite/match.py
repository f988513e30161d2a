"""Matching: where a pattern occurs in a graph, and otherwise what was in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.op import Attribute
from deltaloom.passes.rewrite import pattern as patterns
from deltaloom.passes.rewrite.pattern import Pattern, PatternNode, Step, Term, Wanted


@dataclass(frozen=True)
class Match:
    """An occurrence: ``m.x`` is the graph's value for the pattern's input ``x`` (None for an optional one that is absent),
    ``m["eps"]`` the attribute that ``Any("eps")`` stands for."""

    values: Mapping[str, Value | None]
    attributes: Mapping[str, Attribute]
    nodes: tuple[Node, ...]
    """The matched nodes, the root first."""
    outputs: tuple[Value, ...]
    """What the pattern's outputs are in the graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.values:
            raise AttributeError(f"the pattern has no input '{name}'; it has {', '.join(self.values)}")
        return self.values[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self.attributes:
            raise CompileError(f"the pattern binds no attribute '{name}'; it binds {', '.join(self.attributes) or 'none'}")
        return self.attributes[name]


@dataclass(frozen=True)
class _Found:
    """What is bound so far."""

    values: dict[Term, Value]
    nodes: dict[int, Node]
    attributes: dict[str, Attribute]


class Search:
    """The search for ``pattern`` around nodes of ``graph``, which begins at an op called ``root``. ``miss`` is why the best attempt
    of ``at`` failed: the one that had found most nodes of the pattern."""

    def __init__(self, pattern: Pattern, graph: Graph) -> None:
        self._pattern = pattern
        self._graph = graph
        self._depth = -1
        self.root = pattern.nodes[pattern.root].op.name
        self.miss = ""

    def at(self, node: Node) -> Iterator[Match]:
        """Every occurrence in which ``node`` is the pattern's root."""
        self._depth, self.miss = -1, ""
        for found in self._bind(self._pattern.root, node, _Found({}, {}, {})):
            for whole in self._complete(self._pattern.steps, found):
                yield self._match(whole)

    def _complete(self, steps: tuple[Step, ...], found: _Found) -> Iterator[_Found]:
        if not steps:
            yield found
            return
        step, *rest = steps
        for node in self._candidates(step, found):
            for more in self._bind(step.node, node, found):
                yield from self._complete(tuple(rest), more)

    def _candidates(self, step: Step, found: _Found) -> Iterator[Node]:
        wanted, value = self._pattern.nodes[step.node].op.name, found.values[step.term]
        if step.user:
            users = [node for node in self._graph.users.get(value, ()) if node.op.name == wanted]
            if not users:
                self._missed(found, f"no {wanted} reads {value}")
            yield from users
        elif value.kind != "node":
            self._missed(found, f"{value} is {_ARTICLE[value.kind]} of the graph, where the pattern has {wanted}")
        else:
            yield self._graph.producers[value.name]

    def _bind(self, number: int, node: Node, found: _Found) -> Iterator[_Found]:
        """``found`` with pattern node ``number`` bound to ``node``, in each order that its inputs can have."""
        wanted = self._pattern.nodes[number]
        reason = _difference(wanted, node)
        if reason is None and any(node.name == other.name for other in found.nodes.values()):
            reason = f"%{node.name} stands for another part of the pattern already"
        attributes = dict(found.attributes)
        for name, attribute in node.op.attributes().items() if reason is None else ():
            reason = reason or _unify(f"{name} of %{node.name} = {node.op.name}", wanted.attributes[name], attribute, attributes)
        if reason is not None:
            self._missed(found, reason)
            return
        orders = [node.inputs]
        if node.op.commutative and len(node.inputs) == 2 and node.inputs[0] != node.inputs[1]:
            orders.append(node.inputs[::-1])
        for inputs in orders:
            values = dict(found.values)
            pairs = [*zip(wanted.inputs, inputs, strict=True), *zip(wanted.outputs, node.outputs, strict=True)]
            differing = next(((term, value) for term, value in pairs if values.setdefault(term, value) != value), None)
            if differing is None:
                yield _Found(values, {**found.nodes, number: node}, attributes)
            else:
                term, value = differing
                self._missed(found, f"%{node.name} = {node.op.name} has {value}, where the pattern has {values[term]} again")

    def _missed(self, found: _Found, reason: str) -> None:
        if len(found.nodes) > self._depth:
            self._depth, self.miss = len(found.nodes), reason

    def _match(self, found: _Found) -> Match:
        values: dict[str, Value | None] = {term.label: found.values[term] for term in self._pattern.inputs}
        values.update(dict.fromkeys(self._pattern.absent))
        outputs = tuple(found.values[term] for term in self._pattern.outputs)
        return Match(values, found.attributes, tuple(found.nodes.values()), outputs)


def blocked(match: Match, graph: Graph) -> str | None:
    """Why the matched nodes cannot be replaced as a whole: what they compute is used inside and outside, or an input of the
    pattern comes from one of its nodes. None if they can."""
    inside = {node.name for node in match.nodes}
    for value in (value for node in match.nodes for value in node.outputs if value not in match.outputs):
        for user in graph.users.get(value, ()):
            if user.name not in inside:
                return f"{value} is also used by %{user.name} = {user.op.name}"
        for name, result in (*graph.outputs, *graph.updates):
            if result == value:
                return f"{value} also leaves the graph as '{name}'"
    return _loop(match, graph, inside)


def _loop(match: Match, graph: Graph, inside: set[str]) -> str | None:
    pending = [value for value in match.values.values() if value is not None]
    seen: set[str] = set()
    while pending:
        value = pending.pop()
        maker = graph.producers.get(value.name) if value.kind == "node" else None
        if maker is None or maker.name in seen:
            continue
        if maker.name in inside:
            return f"an input is computed from {value}, which the pattern itself computes"
        seen.add(maker.name)
        pending += maker.inputs
    return None


_ARTICLE = {"input": "an input", "param": "a parameter", "state": "a state", "node": "a value"}


def _difference(wanted: PatternNode, node: Node) -> str | None:
    """In what the shape of ``node`` differs: its op or how many inputs and outputs it has."""
    if node.op.name != wanted.op.name:
        return f"%{node.name} is made by {node.op.name}, where the pattern has {wanted.op.name}"
    if len(node.inputs) != len(wanted.inputs):
        return f"%{node.name} = {node.op.name} has {len(node.inputs)} inputs, the pattern {len(wanted.inputs)}"
    if len(node.outputs) != len(wanted.outputs):
        return f"%{node.name} = {node.op.name} has {len(node.outputs)} outputs, the pattern {len(wanted.outputs)}"
    return None


def _unify(where: str, wanted: Wanted, attribute: Attribute, known: dict[str, Attribute]) -> str | None:
    """None if ``attribute`` is what is ``wanted``, after binding it; otherwise what differs."""
    if isinstance(wanted, patterns.Any):
        first = known.setdefault(wanted.name, attribute)
        return None if _same(first, attribute) else f"{where} is {attribute!r}, but '{wanted.name}' is {first!r} before"
    if isinstance(wanted, tuple) and isinstance(attribute, tuple) and len(wanted) == len(attribute):
        pairs = zip(wanted, attribute, strict=True)
        return next((why for one, other in pairs if (why := _unify(where, one, other, known)) is not None), None)
    return None if _same(wanted, attribute) else f"{where} is {attribute!r}, where the pattern has {wanted!r}"


def _same(one: Any, other: Any) -> bool:
    """Equal and of one type: 1, 1.0 and True differ."""
    return type(one) is type(other) and bool(one == other)
