"""A graph as a drawing for Graphviz: a cluster for each body, an arrow for each value, a colour for each backend."""

from __future__ import annotations

import json
from collections.abc import Iterator

from deltaloom.graph.ir import Call, Graph, Node, Value

COLOURS = ("#cfe2f3", "#fce5cd", "#d9ead3", "#ead1dc", "#fff2cc")
"""Of the backends, in the order in which nodes name them; nodes without one are white."""


def dot(graph: Graph) -> str:
    """``graph`` and its regions in the DOT language. Weights are not drawn; a call has a dashed arrow to its region."""
    bodies = (graph, *graph.regions.values())
    backends = dict.fromkeys(node.placement.backend for body in bodies for node in body.nodes if node.placement is not None)
    colours = {backend: COLOURS[position % len(COLOURS)] for position, backend in enumerate(backends)}
    lines = [
        f"digraph {_quoted(graph.name)} {{",
        "  compound=true; rankdir=TB;",
        "  node [shape=box, style=filled, fillcolor=white];",
    ]
    for position, body in enumerate(bodies):
        lines.append(f"  subgraph cluster_{position} {{")
        lines.append(f"    label={_quoted(body.name)};")
        lines += (f"    {line}" for line in _body(body, colours))
        lines.append("  }")
    for name, region in graph.regions.items():
        entry = next(iter((*region.inputs, *(state.value for state in region.states))), None)
        first = next(node for node in graph.nodes if isinstance(node.op, Call) and node.op.region == name)
        target = region.nodes[0].name if entry is None else str(entry)
        cluster = 1 + list(graph.regions).index(name)
        lines.append(f"  {_id(graph, first.name)} -> {_id(region, target)} [style=dashed, lhead=cluster_{cluster}];")
    return "\n".join([*lines, "}", ""])


def _body(graph: Graph, colours: dict[str, str]) -> Iterator[str]:
    for value in (*graph.inputs, *(state.value for state in graph.states)):
        yield f"{_id(graph, str(value))} [label={_quoted(f'{value}: {value.type}')}, shape=ellipse];"
    made = {value: node.name for node in graph.nodes for value in node.outputs}
    for node in graph.nodes:
        colour = "" if node.placement is None else f", fillcolor={_quoted(colours[node.placement.backend])}"
        yield f"{_id(graph, node.name)} [label={_quoted(_label(node))}{colour}];"
        for value in dict.fromkeys(node.inputs):
            if value.kind != "param":
                yield f"{_id(graph, made.get(value, str(value)))} -> {_id(graph, node.name)};"
    for kind, results in (("output", graph.outputs), ("update", graph.updates)):
        for name, value in results:
            if value.kind != "param":
                yield from _result(graph, kind, name, made.get(value, str(value)))


def _result(graph: Graph, kind: str, name: str, source: str) -> Iterator[str]:
    own = _id(graph, f"{kind} {name}")
    yield f"{own} [label={_quoted(f'{kind} {name}')}, shape=ellipse];"
    yield f"{_id(graph, source)} -> {own};"


def _label(node: Node) -> str:
    op = f"{node.op.region} {node.op.prefix}" if isinstance(node.op, Call) else node.op.name
    where = "" if node.placement is None else f"\n{node.placement.kernel}"
    return f"{node.name}\n{op}{where}\n{_types(node.outputs)}"


def _types(values: tuple[Value, ...]) -> str:
    return ", ".join(str(value.type) for value in values)


def _id(graph: Graph, name: str) -> str:
    return _quoted(f"{graph.name}/{name}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
