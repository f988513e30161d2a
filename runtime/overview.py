"""What a model has and does, part by part: parameters, states, and the work of a decode step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.passes.cost import Work, graph_work

CONTEXT = 4096
"""Tokens that each sequence has behind it, unless told otherwise."""
STATE_CONTEXTS = (4096, 32768, 262144)
"""Lengths for which the size of the states is told."""


@dataclass(frozen=True)
class Part:
    """A body (``depth`` 0) or the nodes of one scope in it, in all its calls together. ``active``: parameters that one token reads;
    a parameter that several parts read counts where most of it is read. ``work`` of a decode step of the whole batch."""

    name: str
    depth: int
    calls: int
    parameters: int
    active: int
    work: Work
    backends: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """A decode step of ``batch`` sequences, each of which has ``context`` tokens behind it. ``letters``: of the layers in
    ``layers`` by region. ``fixed``: bytes of states a sequence, however long it is; ``growing``: bytes of states a token."""

    batch: int
    context: int
    layers: str
    letters: dict[str, str]
    parameters: int
    active: int
    fixed: int
    growing: int
    parts: tuple[Part, ...]

    @property
    def work(self) -> Work:
        """Of the whole step."""
        return sum((part.work for part in self.parts if part.depth == 0), start=Work())

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the states of one sequence of so many tokens."""
        return self.fixed + tokens * self.growing


def overview(given: Graph, placed: Graph, *, batch: int = 1, context: int = CONTEXT) -> Overview:
    """Of a model whose graph was ``given`` and is ``placed`` for decoding. Raises ``RequestError`` for sizes that cannot be."""
    require(batch >= 1, f"batch is {batch}, expected at least 1", RequestError)
    require(context >= 0, f"context is {context}, expected at least 0", RequestError)
    names = layer_names(given)
    letters = layer_letters(names)
    sizes = {"batch": batch, "past": context, "seq": 1}
    fixed, growing = _state_bytes(placed)
    parts = tuple(_parts(placed, sizes))
    tops = [part for part in parts if part.depth == 0]
    parameters, active = sum(part.parameters for part in tops), sum(part.active for part in tops)
    return Overview(batch, context, fold_layers(names, letters), letters, parameters, active, fixed, growing, parts)


def layer_names(graph: Graph) -> list[str]:
    """The region of each layer, in order."""
    return [node.op.region for node in graph.nodes if isinstance(node.op, Call)]


def layer_letters(names: Sequence[str]) -> dict[str, str]:
    """A capital letter for each region: its first one that no region before it has; its number where there is none."""
    letters: dict[str, str] = {}
    for number, name in enumerate(dict.fromkeys(names), 1):
        free = [letter for letter in name.upper() if letter.isalpha() and letter not in letters.values()]
        letters[name] = free[0] if free else str(number)
    return letters


def fold_layers(names: Sequence[str], letters: dict[str, str]) -> str:
    """``12 × (3 × L + A)`` for 48 layers of that pattern."""
    if not names:
        return "none"
    period = next(size for size in range(1, len(names) + 1) if list(names) == (list(names[:size]) * len(names))[: len(names)])
    times = len(names) // period if len(names) % period == 0 else 1
    runs: list[tuple[int, str]] = []
    for name in names if times == 1 else names[:period]:
        count = runs.pop()[0] if runs and runs[-1][1] == name else 0
        runs.append((count + 1, name))
    inner = " + ".join(f"{count} × {letters[name]}" if count > 1 else letters[name] for count, name in runs)
    if times == 1:
        return inner
    return f"{times} × ({inner})" if len(runs) > 1 else f"{times * runs[0][0]} × {letters[runs[0][1]]}"


def _state_bytes(graph: Graph) -> tuple[int, int]:
    """Bytes of states of one sequence: of those of fixed size, and for each token."""
    fixed = growing = 0
    for state in graph.all_states().values():
        number = state.value.type.substitute({"batch": 1, "past": 1}).nbytes()
        require(isinstance(number, int), f"the size of state {state.value}: {state.value.type} does not follow from batch and past")
        assert isinstance(number, int)
        fixed, growing = (fixed + number, growing) if state.append_axis is None else (fixed, growing + number)
    return fixed, growing


def _parts(graph: Graph, sizes: dict[str, int]) -> Iterator[Part]:
    """The nodes before the layers, each body with its scopes, the nodes behind them."""
    work = graph_work(graph, sizes)
    costs = {(one.body, one.node.name): one.work for one in work.nodes}
    calls = Counter(layer_names(graph))
    first = next((i for i, node in enumerate(graph.nodes) if isinstance(node.op, Call)), len(graph.nodes))
    top = [node for node in graph.nodes if not isinstance(node.op, Call)]
    before = list(graph.nodes[:first])
    behind = [node for node in top if node not in before]
    owners = _owners(graph, sizes)
    if before:
        yield _part("input" if calls else graph.name, 0, 1, before, graph, costs, owners)
    for name in calls:
        body = graph.regions[name]
        shares = _owners(body, sizes)
        yield _part(name, 0, calls[name], body.nodes, body, costs, shares)
        scopes: dict[str, list[Node]] = {}
        for node in body.nodes:
            scopes.setdefault(node.scope.partition(".")[0] or "norms and sums", []).append(node)
        for scope, nodes in scopes.items() if len(scopes) > 1 else ():
            yield _part(scope, 1, calls[name], nodes, body, costs, shares)
    if behind:
        yield _part("output", 0, 1, behind, graph, costs, owners)


def _owners(graph: Graph, sizes: dict[str, int]) -> dict[Value, tuple[str, Fraction]]:
    """Parameter -> the node that reads most of it for one token, and how much of it."""
    found: dict[Value, tuple[str, Fraction]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Call):
            continue
        shares = node.op.reads(*(value.type.substitute(sizes) for value in node.inputs))
        names = node.op.input_names()
        for position, value in enumerate(node.inputs):
            share = shares.get(names[position], Fraction(1)) if position < len(names) else Fraction(1)
            if value.kind == "param" and (value not in found or share > found[value][1]):
                found[value] = (node.name, share)
    return found


def _part(
    name: str,
    depth: int,
    calls: int,
    nodes: Sequence[Node],
    graph: Graph,
    costs: dict[tuple[str, str], Work],
    owners: dict[Value, tuple[str, Fraction]],
) -> Part:
    inside = {node.name for node in nodes}
    held = [(math.prod(value.type.static_shape()), share) for value, (node, share) in owners.items() if node in inside]
    work = sum((costs[graph.name, node.name] for node in nodes), start=Work())
    backends = dict.fromkeys(node.placement.backend for node in nodes if node.placement is not None)
    active = round(sum(size * share for size, share in held))
    return Part(name, depth, calls, calls * sum(size for size, _ in held), calls * active, work * calls, tuple(backends))
