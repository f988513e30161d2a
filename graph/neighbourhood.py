"""The lines of text around a fault, for error messages."""

from __future__ import annotations

from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.text import declaration, state_line, statement

AROUND = 2
"""How many lines are shown on either side of the fault."""
WIDTH = 140
"""Longer lines are cut."""

Fault = Node | Value | str | None
"""A node, a declared value, ``output NAME`` or ``update NAME``; None where the fault has no line."""


def neighbourhood(graph: Graph, fault: Fault) -> str:
    """About five lines, each after a line break, with ``>`` at ``fault``, kind or scope as comments; "" without it."""
    rows: list[tuple[object, str, str]] = [(v, declaration(v), v.kind) for v in (*graph.inputs, *graph.params)]
    rows += [(state.value, state_line(state), "state") for state in graph.states]
    rows += [(node, statement(node), node.scope) for node in graph.nodes]
    rows += [(f"output {name}", f"{name} = {value}", "output") for name, value in graph.outputs]
    rows += [(f"update {name}", f"{name} = {value}", "update") for name, value in graph.updates]
    found = [i for i, row in enumerate(rows) if row[0] is fault] or [i for i, row in enumerate(rows) if row[0] == fault]
    if fault is None or not found:
        return ""
    culprit = found[-1]
    first = max(0, culprit - AROUND)
    near = [
        (text if len(text) <= WIDTH else text[:WIDTH] + " …", comment) for _, text, comment in rows[first : culprit + AROUND + 1]
    ]
    width = max(len(text) for text, _ in near)
    lines = []
    for position, (text, comment) in enumerate(near, first):
        mark = ">" if position == culprit else " "
        lines.append(f"\n  {mark} " + (f"{text:<{width}}  # {comment}" if comment else text))
    return "".join(lines)
