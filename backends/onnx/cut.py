"""A part of a flat graph as a graph of its own: what it reads of the rest are its inputs, what the rest reads of it its outputs.

A part is named by the user, in words that dumps and ``deltaloom inspect`` use too, several by comma:

- ``layers.3``, ``layers.3.self_attn``, ``layers.3.self_attn.q``: all nodes of a scope, or one node;
- ``attention_layer``: a region, where it is called first;
- ``layers.1:layers.2.mlp``: everything from the first node of one to the last of the other;
- ``layers.1.x, layers.1.cos -> layers.2.out``: what lies between values, given on the left and wanted on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches

from deltaloom.backends.onnx.flat import Flat
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.ir import Graph, Node, Value

ARROW, RANGE = "->", ":"


def cut(flat: Flat, part: str | Sequence[str]) -> Flat:
    """The part of ``flat`` that ``part`` names. ``ExportError`` for a name that nothing has, and for a part from which a way leads
    out and back in, which no model can be."""
    parts = [part] if isinstance(part, str) else list(part) if isinstance(part, list | tuple) else []
    named = bool(parts) and all(isinstance(one, str) for one in parts)
    require(named, f"the part to export is {part!r}, expected a name or a list of names", ExportError)
    texts = [text.strip() for one in parts for text in (one.split(",") if ARROW not in one else [one])]
    require(bool(texts) and all(texts), f"the part {', '.join(parts)!r} to export has an empty name", ExportError)
    chosen: set[str] = set()
    wanted: list[Value] = []
    given: set[Value] = set()
    for text in texts:
        if ARROW in text:
            left, _, right = text.partition(ARROW)
            given |= set(_values(flat, left))
            wanted += _values(flat, right)
            chosen |= _between(flat.graph, given, _values(flat, right), text)
        else:
            chosen |= _nodes(flat, text)
    return _part(flat, chosen, wanted, given)


def only_op(flat: Flat, name: str) -> Flat:
    """The first node of an op as a graph of its own. ``ExportError`` where the graph has none."""
    found = next((node for node in flat.graph.nodes if node.op.name == name), None)
    if found is None:
        known = sorted({node.op.name for node in flat.graph.nodes})
        raise ExportError(f"graph '{flat.graph.name}' has no op '{name}'{_near(name, known)}; it has {', '.join(known)}")
    return _part(flat, {found.name}, [], set())


def _nodes(flat: Flat, text: str) -> set[str]:
    """The nodes of a scope, a region or a range, by name."""
    if RANGE in text:
        first, _, last = (one.strip() for one in text.partition(RANGE))
        order = [node.name for node in flat.graph.nodes]
        start = min(order.index(name) for name in _nodes(flat, first))
        stop = max(order.index(name) for name in _nodes(flat, last))
        require(start <= stop, f"the range '{text}' ends before it begins; give its ends in the order of computation", ExportError)
        return set(order[start : stop + 1])
    name = text.removeprefix("model.")
    if name in flat.regions:
        name = flat.regions[name][0].removeprefix("model.").rstrip(".")
    elif name in flat.called:
        name = flat.called[name].name
    found = {node.name for node in flat.graph.nodes if _lies_in(node, name)}
    if not found:
        known = {prefix for node in flat.graph.nodes for prefix in _prefixes(node.name)} | set(flat.regions)
        raise ExportError(
            f"graph '{flat.graph.name}' has no node, scope or region '{text}'{_near(name, known)}; `deltaloom inspect` shows them"
        )
    return found


def _lies_in(node: Node, name: str) -> bool:
    return any(value.name == name for value in node.outputs) or node.name.startswith(f"{name}.")


def _prefixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _values(flat: Flat, text: str) -> list[Value]:
    """The values that a list names."""
    known = {value.name: value for value in flat.graph.inputs}
    known |= {value.name: value for node in flat.graph.nodes for value in node.outputs}
    known |= {name: value for name, value in flat.called.items() if name not in known}
    known |= {name: value for name, value in flat.graph.outputs if name not in known}
    found = []
    for one in text.split(","):
        name = one.strip().removeprefix("model.")
        if name not in known:
            raise ExportError(f"graph '{flat.graph.name}' has no value '{one.strip()}' to cut at{_near(name, known)}")
        found.append(known[name])
    return found


def _between(graph: Graph, given: set[Value], wanted: Sequence[Value], text: str) -> set[str]:
    """The nodes that ``wanted`` need, up to ``given``."""
    waiting, found = [value for value in wanted if value not in given], set[str]()
    while waiting:
        node = graph.producers.get(waiting.pop().name)
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += [value for value in node.inputs if value not in given]
    require(bool(found), f"between the two sides of '{text}' there is no node", ExportError)
    return found


def _part(flat: Flat, chosen: set[str], wanted: Sequence[Value], given: set[Value]) -> Flat:
    graph = flat.graph
    nodes = tuple(node for node in graph.nodes if node.name in chosen)
    if wanted:
        _require_needed(nodes, given, wanted)
    else:
        _require_convex(graph, chosen)
    made = {value for node in nodes for value in node.outputs} - given
    read = list(dict.fromkeys(value for node in nodes for value in node.inputs if value not in made))
    kinds = {kind: tuple(value for value in read if value.kind == kind) for kind in ("param", "state")}
    outside = {value for node in graph.nodes if node.name not in chosen for value in node.inputs}
    states = tuple(state for state in graph.states if state.value in kinds["state"])
    updates = tuple((name, value) for name, value in graph.updates if value in made)
    for state in states:
        held = any(name == state.name for name, _ in updates)
        require(
            held,
            f"the part to export reads the state '{state.name}' and does not give its new value; take the node that does into it",
            ExportError,
        )
    public = {value: name for name, value in reversed(graph.outputs) if value in made}
    names = {value: public.get(value, value.name) for value in made}
    updated = {value for _, value in updates}
    used = {value for node in nodes for value in node.inputs}
    leaving = [
        value
        for node in nodes
        for value in node.outputs
        if value in made and (value in outside or value in public or value in wanted or value not in used and value not in updated)
    ]
    kept = wanted or leaving
    inputs = tuple(
        replace(value, kind="input") if value.kind == "node" else value for value in read if value.kind in ("node", "input")
    )
    swap = dict(zip((value for value in read if value.kind in ("node", "input")), inputs, strict=True))
    nodes = tuple(replace(node, inputs=tuple(swap.get(value, value) for value in node.inputs)) for node in nodes)
    part = replace(
        graph, inputs=inputs, params=kinds["param"], states=states, nodes=nodes, updates=updates,
        outputs=tuple((names[value], value) for value in dict.fromkeys(kept)),
    )  # fmt: skip
    return replace(flat, graph=part, weights={value.name: flat.weights[value.name] for value in part.params})


def _require_needed(nodes: Sequence[Node], given: set[Value], wanted: Sequence[Value]) -> None:
    """What is given must be read: a value that is not is behind what is wanted, or beside it."""
    idle = sorted(value.name for value in given - {value for node in nodes for value in node.inputs})
    names = ", ".join(value.name for value in wanted)
    require(not idle, f"{', '.join(idle)} is not needed for {names}; leave it out, or cut further on", ExportError)


def _require_convex(graph: Graph, chosen: set[str]) -> None:
    """No value of the part may be needed outside for what the part itself needs."""
    after: set[Value] = set()
    for node in graph.nodes:
        through = [value for value in node.inputs if value in after]
        if node.name not in chosen:
            if through or any(
                value.name in graph.producers and graph.producers[value.name].name in chosen for value in node.inputs
            ):
                after.update(node.outputs)
        elif through:
            raise ExportError(
                f"the part to export has a hole: %{node.name} needs %{through[0].name}, which is computed outside of it from what "
                f"it gives; take {through[0].name} into the part, or cut in front of {node.name}"
            )


def _near(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
