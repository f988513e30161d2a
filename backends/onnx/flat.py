"""A lifted layer graph with its layers written out: one list of nodes, names as in the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deltaloom.graph.ir import Call, Graph, Node, State, Value
from deltaloom.graph.naming import free_name


@dataclass(frozen=True)
class Weight:
    """A parameter of the model under its full name; ``graph`` (a layer's body) carries the weight graph that makes it, if any."""

    name: str
    prefix: str
    graph: Graph
    value: Value


@dataclass(frozen=True)
class Flat:
    """``graph`` calls no regions. ``weights``: name of each of its parameters -> where it comes from. ``called``: other names of
    values, those that calls gave to the results of layers. ``regions``: region -> the prefixes under which it was called."""

    graph: Graph
    weights: Mapping[str, Weight]
    called: Mapping[str, Value] = field(default_factory=dict)
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def flatten(graph: Graph) -> Flat:
    """``graph`` without calls. Values of a layer are called ``layers.3.x``, as programs that run node by node name them; parameters
    and states have the checkpoint's full names."""
    work = _Flattening(graph)
    work.walk(graph, "", {value: value for value in graph.inputs})
    flat = replace(
        graph, params=tuple(work.params.values()), states=tuple(work.states), nodes=tuple(work.nodes), regions={}, weights=None,
        outputs=tuple(zip((name for name, _ in graph.outputs), work.results, strict=True)), updates=tuple(work.updates.items()),
    )  # fmt: skip
    return Flat(flat, work.weights, work.called, {name: tuple(found) for name, found in work.regions.items()})


class _Flattening:
    def __init__(self, graph: Graph) -> None:
        self._top = graph
        self._taken = {value.name for value in graph.inputs}
        self.params: dict[str, Value] = {}
        self.weights: dict[str, Weight] = {}
        self.states: list[State] = []
        self.nodes: list[Node] = []
        self.updates: dict[str, Value] = {}
        self.called: dict[str, Value] = {}
        self.regions: dict[str, list[str]] = {}
        self.results: list[Value] = []

    def walk(self, graph: Graph, prefix: str, now: dict[Value, Value]) -> list[Value]:
        """Add the nodes of a graph, whose inputs are ``now`` these values; gives its outputs."""
        for value in graph.params:
            full = prefix + value.name
            now[value] = self.params.setdefault(full, replace(value, name=full))
            self.weights.setdefault(full, Weight(full, prefix, graph, value))
        for state in graph.states:
            now[state.value] = replace(state.value, name=prefix + state.name)
            self.states.append(replace(state, value=now[state.value]))
        short = prefix.removeprefix("model.")
        for node in graph.nodes:
            given = tuple(now[value] for value in node.inputs)
            if isinstance(node.op, Call):
                region = self._top.region(node.op.region)
                self.regions.setdefault(region.name, []).append(node.op.prefix)
                made = self.walk(region, node.op.prefix, dict(zip(region.inputs, given, strict=True)))
                self.called.update({value.name: new for value, new in zip(node.outputs, made, strict=True)})
            else:
                made = [self._named(value, short) for value in node.outputs]
                self.nodes.append(replace(node, inputs=given, outputs=tuple(made), scope=f"{short}{node.scope}".rstrip(".")))
            now.update(zip(node.outputs, made, strict=True))
        self.updates.update({prefix + name: now[value] for name, value in graph.updates})
        self.results = [now[value] for _, value in graph.outputs]
        return self.results

    def _named(self, value: Value, short: str) -> Value:
        name = free_name(short + value.name, self._taken)
        self._taken.add(name)
        return replace(value, name=name)
