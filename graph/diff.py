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


def diff(before: Graph, after: Graph) -> str:
    """A readable difference, by graph and region: ``-`` gone, ``+`` new, ``~`` in both with a line that differs, and the
    numbers of each. The builder's lines and origins do not count. "" where nothing differs."""
    blocks = []
    bodies_before, bodies_after = dict(_bodies(before, "")), dict(_bodies(after, ""))
    for title in dict.fromkeys([*bodies_before, *bodies_after]):
        block = _block(title, _entries(bodies_before.get(title)), _entries(bodies_after.get(title)))
        blocks += [block] if block else []
    return "\n".join(blocks)


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


def _block(title: str, before: Mapping[str, _Entry], after: Mapping[str, _Entry]) -> str:
    lines: list[str] = []
    counts = {"removed": 0, "added": 0, "changed": 0}
    for key in _merged(list(before), list(after)):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if old is not None and new is not None:
            counts["changed"] += 1
            lines += [f"~ - {_line(old)}", f"~ + {_line(new)}"]
        elif old is not None:
            counts["removed"] += 1
            lines.append(f"-   {_line(old)}")
        elif new is not None:
            counts["added"] += 1
            lines.append(f"+   {_line(new)}")
    if not lines:
        return ""
    numbers = ", ".join(f"{count} {what}" for what, count in counts.items())
    total = f"{_nodes(before)} -> {_nodes(after)} nodes"
    return "\n".join([f"{title}: {numbers} ({total})", *(f"  {line}" for line in lines)])


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
