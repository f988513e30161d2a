"""Applying rules: again and again, at the first node that one of them takes, until none does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import CompileError, DeltaloomError
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.op import Op
from deltaloom.graph.rewriter import Rewriter, common_scope
from deltaloom.passes.pipeline import Event, Fuel
from deltaloom.passes.rewrite.match import Match, Search, blocked
from deltaloom.passes.rewrite.pattern import given
from deltaloom.passes.rewrite.rule import Rule

LIMIT = 100
"""Rewrites that are allowed for each node of a graph, before the rules are taken to undo one another."""


class Replacement(GraphBuilder):
    """The ``g`` of a rewrite: a builder over values of the graph that is rewritten, inside ``scope``."""

    def __init__(self, graph: Graph, scope: str) -> None:
        super().__init__(graph.name)
        self._scope = f"{scope}." if scope else ""
        self._taken = {value.name for value in (*graph.inputs, *graph.params)} | set(graph.producers)

    def apply(self, op: Op, *inputs: Value, name: str | None = None) -> Any:
        """Add one node; trailing inputs that are None are left out."""
        return super().apply(op, *given(inputs), name=name)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What was added so far."""
        return tuple(self._nodes)


def apply_rules(graph: Graph, rules: Sequence[Rule], fuel: Fuel | None = None) -> tuple[Graph, list[Event]]:
    """``graph`` (its regions are left alone) after ``rules``, and what happened: a hit for each rewrite, then, where a rule's root
    is and the rule did not apply, why. At each node, in order, the rules are tried in theirs.

    Raises ``CompileError`` for rules that never come to an end or whose replacement has other types."""
    fuel = fuel or Fuel()
    hits: list[Event] = []
    allowed = LIMIT * (len(graph.nodes) + 1)
    while True:
        misses: list[Event] = []
        found = next(_occurrences(graph, rules, misses), None)
        if found is None:
            return graph, hits + misses
        rule, match = found
        if not fuel.burn():
            hits.append(Event("out of fuel", rule.name, graph.name, match.nodes[0].name, "the number of rewrites is limited"))
            return graph, hits
        if len(hits) >= allowed:
            last = ", ".join(sorted({event.rule for event in hits[-10:]}))
            raise CompileError(f"after {allowed} rewrites rules still apply to graph '{graph.name}'; they undo one another: {last}")
        graph = replaced(graph, rule, match)
        hits.append(Event("hit", rule.name, graph.name, match.outputs[0].name, f"replaced {len(match.nodes)} nodes"))


def _occurrences(graph: Graph, rules: Sequence[Rule], misses: list[Event]) -> Iterator[tuple[Rule, Match]]:
    """Where rules apply; ``misses`` gets the near misses and refusals on the way."""
    searches = [(rule, Search(pattern, graph)) for rule in rules for pattern in rule.patterns]
    roots = {search.root for _, search in searches}
    for node in graph.nodes:
        if node.op.name not in roots:
            continue
        notes: dict[str, Event] = {}
        for rule, search in searches:
            if search.root != node.op.name:
                continue
            refusal = None
            for match in search.at(node):
                reason = blocked(match, graph) or rule.check(match)
                if reason is None:
                    yield rule, match
                refusal = refusal or reason
            if refusal is not None:
                notes[rule.name] = Event("refused", rule.name, graph.name, node.name, refusal)
            else:
                notes.setdefault(rule.name, Event("near miss", rule.name, graph.name, node.name, search.miss))
        misses += notes.values()


def replaced(graph: Graph, rule: Rule, match: Match) -> Graph:
    """``graph`` with ``match`` rewritten: the new values have the names of those that they replace, the new nodes the scope that
    the replaced nodes share."""
    builder = Replacement(graph, common_scope(match.nodes))
    try:
        made = rule.rewrite(builder, match)
        results = made if isinstance(made, tuple) else (made,)
        if len(results) != len(match.outputs):
            raise CompileError(f"the rewrite gives {len(results)} values for {len(match.outputs)} of its pattern")
        rewriter = Rewriter(graph)
        for node in match.nodes:
            rewriter.remove(node)
        here = _insert(rewriter, builder.nodes, _names(match.outputs, results), _after(graph, match), match.nodes)
        for old, new in zip(match.outputs, results, strict=True):
            rewriter.replace(old, here.get(new, new))
        return rewriter.result(after=rule.name)
    except DeltaloomError as error:
        error.add_note(f"  in the rewrite of rule {rule.name} at %{match.nodes[0].name}")
        raise


def _after(graph: Graph, match: Match) -> Node | None:
    """The node in front of which the replacement stands: the next one behind the last that was matched."""
    inside = {node.name for node in match.nodes}
    last = max(position for position, node in enumerate(graph.nodes) if node.name in inside)
    return next(iter(graph.nodes[last + 1 :]), None)


def _names(old: Sequence[Value], new: Sequence[Value]) -> dict[Value, str]:
    """New value -> the name that it takes over."""
    names: dict[Value, str] = {}
    for before, after in zip(old, new, strict=True):
        names.setdefault(after, before.name)
    return names


def _insert(
    rewriter: Rewriter, nodes: Sequence[Node], names: dict[Value, str], before: Node | None, replaces: Sequence[Node]
) -> dict[Value, Value]:
    """Put the builder's ``nodes`` in; gives what became of their values."""
    here: dict[Value, Value] = {}
    for node in nodes:
        wanted = [names.get(value, value.name) for value in node.outputs]
        inputs = [here.get(value, value) for value in node.inputs]
        made = rewriter.insert_all(node.op, inputs, names=wanted, before=before, replaces=replaces)
        here.update(zip(node.outputs, made, strict=True))
    return here
