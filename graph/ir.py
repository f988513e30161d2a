"""The graph: immutable SSA. A pass returns a new graph; nothing here is ever changed in place.

A ``Graph`` owns named regions (layer bodies) that its ``call`` nodes run. Parameters and states inside a region have relative
names: the prefix of the call plus the name is the checkpoint's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

from deltaloom.graph.dims import Dim, Symbol
from deltaloom.graph.errors import GraphError
from deltaloom.graph.op import Op
from deltaloom.graph.types import TensorType

FORMAT_VERSION = 1
"""Version of the text and JSON forms; readers refuse newer ones."""

ValueKind = Literal["node", "input", "param", "state"]
SIGILS: dict[ValueKind, str] = {"node": "%", "input": "%", "param": "@", "state": "$"}


@dataclass(frozen=True)
class Value:
    """A named, typed value; names are unique within a graph and stay through passes. In a graph that ranks share, the type is
    that of one rank and ``sharding`` tells people what it is of the whole: ``"tp: 2"`` (axis 2 is divided) or ``"tp: partial"``.
    It is a remark on the value and no part of what the value is, so equal values may differ in it."""

    name: str
    type: TensorType
    kind: ValueKind = "node"
    sharding: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return hash(self.name)  # all but always enough to tell values apart, and the type's hash is a long one

    def __str__(self) -> str:
        return SIGILS[self.kind] + self.name


@dataclass(frozen=True)
class Refusal:
    """Why a kernel did not get a node."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


@dataclass(frozen=True)
class Placement:
    """Which kernel runs a node, and why the ones before it in the configured order do not. ``layouts`` gives, by input position,
    the axis order in which the kernel gets a weight (``(1, 0)``: stored transposed); absent means as typed."""

    backend: str
    kernel: str
    refusals: tuple[Refusal, ...] = ()
    layouts: tuple[tuple[int, tuple[int, ...]], ...] = ()


class Call(Op):
    """Run a region of the graph: its parameters and states are those of the enclosing model under ``prefix``."""

    name: ClassVar[str] = "call"
    region: str
    prefix: str

    def infer(self, *types: TensorType) -> TensorType | tuple[TensorType, ...]:
        raise GraphError(f"the types of call '{self.region}' come from its region; use Graph.call_types")


@dataclass(frozen=True)
class Node:
    """One evaluation of an op. ``scope`` is its path in the model, ``source`` the builder's line, ``origins`` the names of
    values of earlier graphs that it was rewritten from; ``placement`` is filled by the assign pass."""

    op: Op
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scope: str = ""
    source: str = ""
    origins: tuple[str, ...] = ()
    placement: Placement | None = None

    @property
    def name(self) -> str:
        """The name of the first output names the node."""
        return self.outputs[0].name


@dataclass(frozen=True)
class State:
    """State carried between runs: an input and an output of the program. ``append_axis=None``: fixed size, starts at zero;
    otherwise it starts empty and every run concatenates along that axis."""

    value: Value
    append_axis: int | None = None

    @property
    def name(self) -> str:
        return self.value.name


@dataclass(frozen=True)
class Instance:
    """One use of a graph in a model: the graph (the top level or a region) and the prefix of its parameters and states."""

    prefix: str
    graph: Graph


@dataclass(frozen=True)
class Graph:
    """A program or a region of one. ``outputs`` and ``updates`` are pairs of public name (of state) and value."""

    name: str
    inputs: tuple[Value, ...] = ()
    params: tuple[Value, ...] = ()
    states: tuple[State, ...] = ()
    nodes: tuple[Node, ...] = ()
    outputs: tuple[tuple[str, Value], ...] = ()
    updates: tuple[tuple[str, Value], ...] = ()
    regions: Mapping[str, Graph] = field(default_factory=dict)
    weights: Graph | None = None
    """The weight graph, once weights are lifted: from checkpoint parameters to outputs named as this graph's ``params``."""

    @cached_property
    def producers(self) -> dict[str, Node]:
        """Value name -> the node that makes it."""
        return {value.name: node for node in self.nodes for value in node.outputs}

    @cached_property
    def users(self) -> dict[Value, tuple[Node, ...]]:
        """Value -> the nodes that read it, in order. Graph outputs and updates are not nodes and not listed."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    @property
    def results(self) -> tuple[Value, ...]:
        """Everything that leaves the graph: outputs, then state updates."""
        return tuple(value for _, value in (*self.outputs, *self.updates))

    def output(self, name: str) -> Value:
        """The output called ``name``."""
        for key, value in self.outputs:
            if key == name:
                return value
        raise GraphError(f"graph '{self.name}' has no output '{name}'; it has {', '.join(k for k, _ in self.outputs)}")

    def region(self, name: str) -> Graph:
        """The region called ``name``."""
        if name not in self.regions:
            raise GraphError(f"graph '{self.name}' has no region '{name}'; it has {', '.join(self.regions) or 'none'}")
        return self.regions[name]

    def node_types(self, node: Node) -> tuple[TensorType, ...]:
        """The output types that ``node`` must have: of its region for a call, of ``infer`` otherwise."""
        if isinstance(node.op, Call):
            return tuple(value.type for _, value in self.region(node.op.region).outputs)
        return node.op.output_types(*(value.type for value in node.inputs))

    def instances(self) -> Iterator[Instance]:
        """The top level, then every call in order."""
        yield Instance("", self)
        for node in self.nodes:
            if isinstance(node.op, Call):
                yield Instance(node.op.prefix, self.region(node.op.region))

    def all_params(self) -> dict[str, TensorType]:
        """Full name -> type of every checkpoint parameter of the model, in the order of use."""
        return {i.prefix + p.name: p.type for i in self.instances() for p in (i.graph.weights or i.graph).params}

    def all_states(self) -> dict[str, State]:
        """Full name -> state of every state of the model, in the order of use."""
        return {i.prefix + s.name: s for i in self.instances() for s in i.graph.states}

    def symbols(self) -> dict[str, Symbol]:
        """Every symbol that occurs in a type, by name."""
        values = [*self.inputs, *self.params, *(s.value for s in self.states)]
        values += [value for node in self.nodes for value in node.outputs]
        found = {s.name: s for value in values for s in value.type.symbols()}
        for region in self.regions.values():
            found.update(region.symbols())
        if self.weights is not None:
            found.update(self.weights.symbols())
        return dict(sorted(found.items()))

    def substitute(self, values: Mapping[str, Dim]) -> Graph:
        """The graph with symbols of all types replaced, regions included; the same graph where none of them occurs."""
        if not set(values).intersection(self.symbols()):
            return self

        def sub(value: Value) -> Value:
            return replace(value, type=value.type.substitute(values))

        return replace(
            self,
            inputs=tuple(map(sub, self.inputs)),
            params=tuple(map(sub, self.params)),
            states=tuple(replace(s, value=sub(s.value)) for s in self.states),
            nodes=tuple(replace(n, inputs=tuple(map(sub, n.inputs)), outputs=tuple(map(sub, n.outputs))) for n in self.nodes),
            outputs=tuple((name, sub(value)) for name, value in self.outputs),
            updates=tuple((name, sub(value)) for name, value in self.updates),
            regions={name: region.substitute(values) for name, region in self.regions.items()},
            weights=None if self.weights is None else self.weights.substitute(values),
        )

    def map_regions(self, change: Callable[[Graph], Graph]) -> Graph:
        """The graph with every region replaced by ``change(region)``."""
        return replace(self, regions={name: change(region) for name, region in self.regions.items()})

    def __str__(self) -> str:
        from deltaloom.graph.text import print_graph

        return print_graph(self)


def names_apart(*graphs: Graph) -> bool:
    """Whether the prefixes of all calls alone tell that no parameter of one instance is another's too. Layers of large models have
    thousands of parameters each, whose full names need not be written out then."""
    prefixes = sorted(node.op.prefix for graph in graphs for node in graph.nodes if isinstance(node.op, Call))
    if any(longer.startswith(prefix) for prefix, longer in zip(prefixes, prefixes[1:])):
        return False
    owners = [owner for graph in graphs for owner in (graph, graph.weights) if owner is not None]
    return not any(value.name.startswith(tuple(prefixes)) for owner in owners for value in owner.params)
