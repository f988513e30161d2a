"""What changed between two graphs, told by the names of their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deltaloom.graph.ir import Graph
from deltaloom.graph.text import declaration, state_line, statement, word


@dataclass(frozen=True)
class _Entry:
    """One line of a graph: its text, and the scope of a node."""

    text: str
    scope: str = ""


@dataclass(frozen=True)
class BodyDiff:
    """What changed in one graph, region or weight graph: how many lines went, came and changed, its nodes before and after, and the
    lines: a mark (``-`` gone, ``+`` new, ``~ -`` and ``~ +`` in both, but different) and the text."""

    body: str
    removed: int
    added: int
    changed: int
    nodes: tuple[int, int]
    lines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        before, after = self.nodes
        counts = f"{self.removed} removed, {self.added} added, {self.changed} changed ({before} -> {after} nodes)"
        return "\n".join([f"{self.body}: {counts}", *(f"  {mark:<3} {text}" for mark, text in self.lines)])


def diff(before: Graph, after: Graph) -> str:
    """``body_diffs`` as text. "" where nothing differs."""
    return "\n".join(map(str, body_diffs(before, after)))


def body_diffs(before: Graph, after: Graph) -> list[BodyDiff]:
    """The difference by graph, region and weight graph, those excepted in which nothing differs. The builder's lines and origins
    do not count."""
    bodies_before, bodies_after = dict(_bodies(before, "")), dict(_bodies(after, ""))
    titles = dict.fromkeys([*bodies_before, *bodies_after])
    found = [_block(title, _entries(bodies_before.get(title)), _entries(bodies_after.get(title))) for title in titles]
    return [one for one in found if one.lines]


def _bodies(graph: Graph, prefix: str) -> Iterator[tuple[str, Graph]]:
    yield prefix or "graph", graph
    for name, region in graph.regions.items():
        yield from _bodies(region, f"{prefix + ' ' if prefix else ''}region {word(name)}")
    if graph.weights is not None:
        yield from _bodies(graph.weights, f"{prefix + ' ' if prefix else ''}weights")


def _entries(graph: Graph | None) -> dict[str, _Entry]:
    """The lines of a graph by what they are about; the name of a node's first output stands for the node."""
    if graph is None:
        return {}
    found = {f"input {v.name}": _Entry("input " + declaration(v)) for v in graph.inputs}
    found.update({f"param {v.name}": _Entry("param " + declaration(v)) for v in graph.params})
    found.update({f"state {s.name}": _Entry("state " + state_line(s)) for s in graph.states})
    found.update({f"%{n.name}": _Entry(statement(n), n.scope) for n in graph.nodes})
    found.update({f"output {name}": _Entry(f"output {name} = {v}") for name, v in graph.outputs})
    found.update({f"update {name}": _Entry(f"update {name} = {v}") for name, v in graph.updates})
    return found


def _block(title: str, before: Mapping[str, _Entry], after: Mapping[str, _Entry]) -> BodyDiff:
    lines: list[tuple[str, str]] = []
    removed = added = changed = 0
    for key in _merged(list(before), list(after)):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if old is not None and new is not None:
            changed += 1
            lines += [("~ -", _line(old)), ("~ +", _line(new))]
        elif old is not None:
            removed += 1
            lines.append(("-", _line(old)))
        elif new is not None:
            added += 1
            lines.append(("+", _line(new)))
    return BodyDiff(title, removed, added, changed, (_nodes(before), _nodes(after)), tuple(lines))


def _merged(before: list[str], after: list[str]) -> list[str]:
    """Keys of both in one order: that of ``after``, with what is gone behind what it followed in ``before``."""
    kept = set(after)
    followers: dict[str | None, list[str]] = {}
    last: str | None = None
    for key in before:
        if key in kept:
            last = key
        else:
            followers.setdefault(last, []).append(key)
    merged = list(followers.get(None, []))
    for key in after:
        merged += [key, *followers.get(key, [])]
    return merged


def _nodes(entries: Mapping[str, _Entry]) -> int:
    return sum(key.startswith("%") for key in entries)


def _line(entry: _Entry) -> str:
    return entry.text + (f"  # {entry.scope}" if entry.scope else "")
