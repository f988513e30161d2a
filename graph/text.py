"""The text form of a graph, which ``deltaloom.graph.parse`` reads back exactly. Its grammar, by example::

    graph tiny (format 1)
    symbols batch >= 1, past >= 0, 1 <= seq <= 4096
    inputs
      %ids: i64[batch, seq]
    params
      @embed.weight: f32[160, 32]
    states
      $keys: f32[batch, 2, past, 8] append axis 2
    nodes
      %x: f32[batch, seq, 32] = embedding(%ids, @embed.weight)  # model at tiny/graph.py:12 from old_x
    outputs
      hidden = %x
    updates
      keys = %new_keys
    weights tiny.weights
      params
        @embed.weight: f32[160, 32]
      outputs
        embed.weight = @embed.weight
    region layer
      inputs
      ...

``# SCOPE at SOURCE from ORIGIN, ORIGIN`` belongs to the node; lines that begin with ``#`` are remarks and are not read.
A node that has a kernel says ``on BACKEND KERNEL``, then ``input 1 stored (1, 0)`` for each layout that it wants, then
``not KERNEL: "reason"`` for each kernel that refused. A region or weight graph may have both sub-graphs itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from deltaloom.graph.dims import Symbol
from deltaloom.graph.ir import FORMAT_VERSION, Call, Graph, Node, State, Value

WORD = re.compile(r"[^\s,:#\"'(){}\[\]=]+(?::[^\s,:#\"'(){}\[\]=]+)*")
"""A word that needs no quotes; a colon may stand inside (``graph.py:12``)."""
KEYWORDS = frozenset({"at", "from", "on", "not"})


def print_graph(graph: Graph, *, sources: bool = True) -> str:
    """The graph as text. Without ``sources`` the builder's lines are left out, for texts that are kept in files."""
    lines = [f"graph {word(graph.name)} (format {FORMAT_VERSION})"]
    if symbols := graph.symbols():
        lines.append("symbols " + ", ".join(map(symbol_text, symbols.values())))
    lines += _body(graph, sources)
    return "\n".join(lines) + "\n"


def symbol_text(symbol: Symbol) -> str:
    """``past >= 0`` or ``1 <= seq <= 4096``."""
    return f"{symbol.name} >= {symbol.low}" if symbol.high is None else f"{symbol.low} <= {symbol.name} <= {symbol.high}"


def declaration(value: Value) -> str:
    """``%x: f32[batch, 4]``, or ``%x: f32[batch, 4]{tp: 1}`` for what is divided over ranks."""
    return f"{value}: {value.type}" + (f"{{{value.sharding}}}" if value.sharding else "")


def state_line(state: State) -> str:
    """The declaration of a state, with the axis along which it grows."""
    grows = "" if state.append_axis is None else f" append axis {state.append_axis}"
    return declaration(state.value) + grows


def node_line(node: Node, *, sources: bool = True) -> str:
    """One node: outputs with types, op, inputs, attributes, kernel, then scope, source and origins as a comment."""
    comment = _comment(node, sources)
    return statement(node) + (f"  # {comment}" if comment else "")


def statement(node: Node) -> str:
    """A node without its comment."""
    version = f" v{node.op.version}" if node.op.version > 1 else ""
    attributes = ", ".join(f"{key}={value!r}" for key, value in node.op.attributes().items())
    text = f"{', '.join(map(declaration, node.outputs))} = {node.op.name}{version}({', '.join(map(str, node.inputs))})"
    if attributes:
        text += f" {{{attributes}}}"
    if node.placement is not None:
        text += f" on {word(node.placement.backend)} {word(node.placement.kernel)}"
        text += "".join(f", input {position} stored {axes}" for position, axes in node.placement.layouts)
        text += "".join(f", not {word(r.kernel)}: {json.dumps(r.reason)}" for r in node.placement.refusals)
    return text


def word(text: str) -> str:
    """``text`` as it is where it reads as one word, in quotes otherwise."""
    return text if WORD.fullmatch(text) and text not in KEYWORDS else json.dumps(text)


def _comment(node: Node, sources: bool) -> str:
    parts = [word(node.scope)] if node.scope else []
    if node.source and sources:
        parts.append(f"at {word(node.source)}")
    if node.origins:
        parts.append(f"from {', '.join(map(word, node.origins))}")
    return " ".join(parts)


def _body(graph: Graph, sources: bool) -> Iterator[str]:
    sections = {
        "inputs": [declaration(value) for value in graph.inputs],
        "params": [declaration(value) for value in graph.params],
        "states": [state_line(state) for state in graph.states],
        "nodes": [node_line(node, sources=sources) for node in graph.nodes],
        "outputs": [f"{word(name)} = {value}" for name, value in graph.outputs],
        "updates": [f"{word(name)} = {value}" for name, value in graph.updates],
    }
    for title, lines in sections.items():
        if lines:
            yield title
            yield from (f"  {line}" for line in lines)
    calls = [node.op.region for node in graph.nodes if isinstance(node.op, Call) and node.op.region in graph.regions]
    names = dict.fromkeys([*calls, *sorted(graph.regions)])
    owned = [("region", name, graph.regions[name]) for name in names]
    if graph.weights is not None:
        owned.insert(0, ("weights", graph.weights.name, graph.weights))
    for kind, name, body in owned:
        yield f"{kind} {word(name)}"
        yield from (f"  {line}" for line in _body(body, sources))
