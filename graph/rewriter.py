"""Editing a graph: a ``Rewriter`` collects changes to one graph or region and gives a new, verified graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.op import Op
from deltaloom.graph.order import topological
from deltaloom.graph.types import TensorType
from deltaloom.graph.verify import verify


class Rewriter:
    """Changes to ``graph``, which stays as it is. Nodes and values of the original graph may be named throughout:
    a node is found by the name of its first output; a value that was replaced or renamed counts as its successor."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: list[Node] = list(graph.nodes)
        self._inputs = list(graph.inputs)
        self._params = list(graph.params)
        self._states = list(graph.states)
        self._outputs = dict(graph.outputs)
        self._updates = dict(graph.updates)
        self._regions = dict(graph.regions)
        self._weights = graph.weights
        self._successors: dict[Value, Value] = {}
        self._renamed: dict[str, str] = {}
        self._removed: set[Value] = set()
        self._shardings = {value.name: value.sharding for node in graph.nodes for value in node.outputs}

    def current(self, value: Value) -> Value:
        """What ``value`` has become: its last successor, or itself."""
        while value in self._successors:
            value = self._successors[value]
        return value

    def insert(
        self, op: Op, inputs: Sequence[Value], *, name: str, before: Node | None = None, replaces: Sequence[Node] = ()
    ) -> Value:
        """``insert_all`` for an op with one output."""
        values = self.insert_all(op, inputs, names=[name], before=before, replaces=replaces)
        return values[0]

    def insert_all(
        self,
        op: Op,
        inputs: Sequence[Value],
        *,
        names: Sequence[str],
        before: Node | None = None,
        replaces: Sequence[Node] = (),
    ) -> tuple[Value, ...]:
        """A new node in front of ``before`` (at the end without it), its types inferred. ``names`` are the wanted names
        of its outputs, in full; one that is taken gets a number. Origins, the source (of the first) and the scope (what they
        share) come from ``replaces``, or, where that is empty, from ``before``. Raises ``GraphError`` for inputs that the op
        refuses."""
        given = tuple(self.current(value) for value in inputs)
        position = len(self._nodes) if before is None else self._position(before)
        near = replaces or (() if before is None else (self._nodes[position],))
        types = self._types(op, given)
        if len(types) != len(names):
            raise GraphError(f"op {op.name} has {len(types)} outputs, but the names {', '.join(names)} were given for it")
        taken = self._names()
        outputs = []
        for name, type_ in zip(names, types, strict=True):
            outputs.append(Value(free_name(name, taken), type_))
            taken.add(outputs[-1].name)
        source = near[0].source if near else ""
        self._nodes.insert(position, Node(op, given, tuple(outputs), common_scope(near), source, _origins(near)))
        return tuple(outputs)

    def change(
        self, node: Node, op: Op, inputs: Sequence[Value] | None = None, *, replaces: Sequence[Node] = ()
    ) -> tuple[Value, ...]:
        """Give ``node`` another op (and other inputs); its outputs keep their names and take the op's types."""
        position = self._position(node)
        old = self._nodes[position]
        given = old.inputs if inputs is None else tuple(self.current(value) for value in inputs)
        types = self._types(op, given)
        if len(types) != len(old.outputs):
            raise GraphError(
                f"%{old.name} has {len(old.outputs)} outputs and {op.name} gives {len(types)}; insert a node and remove this one"
            )
        outputs = tuple(replace(v, type=t) for v, t in zip(old.outputs, types, strict=True))
        self._nodes[position] = replace(
            old, op=op, inputs=given, outputs=outputs, origins=_origins(replaces or (old,)), placement=None
        )
        for before, after in zip(old.outputs, outputs, strict=True):
            if before != after:
                self._exchange(before, after, set())
        return outputs

    def replace(self, old: Value, new: Value) -> None:
        """Every use of ``old``, as a result of the graph too, becomes ``new`` of the same type. Nodes that ``new`` is
        computed from keep ``old``, so that a value may be wrapped: insert ``new = f(old)``, then replace ``old``."""
        old, new = self.current(old), self.current(new)
        if old.type != new.type:
            raise GraphError(f"{old}: {old.type} cannot be replaced by {new}: {new.type}, because the types differ")
        if old != new:
            self._shardings.setdefault(new.name, self._shardings.get(old.name, ""))
            self._exchange(old, new, self._ancestors(new))

    def remove(self, node: Node) -> None:
        """Take ``node`` out. Uses of its outputs must be gone by ``result``; the order of edits does not matter."""
        removed = self._nodes.pop(self._position(node))
        self._removed.update(removed.outputs)

    def rename(self, value: Value, name: str) -> Value:
        """Give an input or a node's output another name, which must be free."""
        value = self.current(value)
        if value.kind not in ("node", "input"):
            raise GraphError(f"{value} cannot be renamed to '{name}': the names of parameters and states are the model's")
        if name in self._names():
            raise GraphError(f"{value} cannot be renamed to '{name}': the name is taken in graph '{self._graph.name}'")
        new = replace(value, name=name)
        for position, node in enumerate(self._nodes):
            if value in node.outputs:
                outputs = tuple(new if v == value else v for v in node.outputs)
                self._nodes[position] = replace(node, outputs=outputs, origins=_origins((node,)))
        self._inputs = [new if v == value else v for v in self._inputs]
        self._renamed[value.name] = name
        self._exchange(value, new, set())
        return new

    def add_input(self, name: str, type_: TensorType, *, after: Value | None = None) -> Value:
        """A further input, behind the input ``after`` or behind all others; its name must be free."""
        if name in self._names():
            raise GraphError(f"graph '{self._graph.name}' cannot get an input '{name}': the name is taken")
        position = len(self._inputs) if after is None else self._inputs.index(self.current(after)) + 1
        self._inputs.insert(position, Value(name, type_, "input"))
        return self._inputs[position]

    def add_param(self, name: str, type_: TensorType) -> Value:
        """The parameter ``name``, added where it is new; ``GraphError`` where it exists with another type."""
        for value in self._params:
            if value.name == name:
                if value.type != type_:
                    raise GraphError(f"parameter '{name}' is {value.type} and is now asked for as {type_}")
                return value
        self._params.append(Value(name, type_, "param"))
        return self._params[-1]

    def remove_param(self, value: Value) -> None:
        """Take a parameter out. Its uses must be gone by ``result``."""
        if value not in self._params:
            raise GraphError(f"graph '{self._graph.name}' has no parameter {value}: {value.type} to remove")
        self._params.remove(value)
        self._removed.add(value)

    def set_output(self, name: str, value: Value) -> None:
        """Make ``value`` the output ``name``, a new one or in the place of the old one."""
        self._outputs[name] = self.current(value)

    def set_outputs(self, outputs: Mapping[str, Value]) -> None:
        """Have these outputs, in this order, and no others."""
        self._outputs = {name: self.current(value) for name, value in outputs.items()}

    def set_regions(self, regions: Mapping[str, Graph]) -> None:
        """Use other regions, for example ones with other parameters or inputs; calls are then checked against these."""
        self._regions = dict(regions)

    def result(self, *, after: str = "") -> Graph:
        """The new graph, its nodes in an order that defines before it uses (unchanged where it was one), verified;
        ``after`` names the pass in the error."""
        self._refuse_removed_uses()
        graph = Graph(
            self._graph.name,
            tuple(self._inputs),
            tuple(self._params),
            tuple(self._states),
            topological([self._with_shardings(node) for node in self._nodes]),
            tuple(self._outputs.items()),
            tuple(self._updates.items()),
            self._regions,
            self._weights,
        )
        verify(graph, after=after)
        return graph

    def _with_shardings(self, node: Node) -> Node:
        """The node with what was known of its outputs, or of those in whose place they are."""
        known = [value.sharding or self._shardings.get(value.name, "") for value in node.outputs]
        if known == [value.sharding for value in node.outputs]:
            return node
        return replace(node, outputs=tuple(replace(v, sharding=s) for v, s in zip(node.outputs, known)))

    def _types(self, op: Op, inputs: tuple[Value, ...]) -> tuple[TensorType, ...]:
        if isinstance(op, Call):
            if op.region not in self._regions:
                raise GraphError(f"graph '{self._graph.name}' has no region '{op.region}' to call")
            return tuple(value.type for _, value in self._regions[op.region].outputs)
        return op.output_types(*(value.type for value in inputs))

    def _position(self, node: Node) -> int:
        wanted = node.name
        while wanted in self._renamed:
            wanted = self._renamed[wanted]
        for position, known in enumerate(self._nodes):
            if known.name == wanted:
                return position
        raise GraphError(f"graph '{self._graph.name}' has no node %{node.name}; it was removed or belongs to another graph")

    def _names(self) -> set[str]:
        """Names that a new value may not have: one that was renamed away still finds its node, so it stays taken."""
        made = {value.name for node in self._nodes for value in node.outputs}
        return made | {value.name for value in self._inputs} | set(self._renamed)

    def _ancestors(self, value: Value) -> set[str]:
        """The names of the nodes that ``value`` is computed from, its own node included."""
        producers = {made: node for node in self._nodes for made in node.outputs}
        waiting, found = [value], set[str]()
        while waiting:
            node = producers.get(waiting.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                waiting += node.inputs
        return found

    def _exchange(self, old: Value, new: Value, untouched: set[str]) -> None:
        for position, node in enumerate(self._nodes):
            if old in node.inputs and node.name not in untouched:
                inputs = tuple(new if value == old else value for value in node.inputs)
                self._nodes[position] = replace(node, inputs=inputs)
        self._outputs = {name: new if value == old else value for name, value in self._outputs.items()}
        self._updates = {name: new if value == old else value for name, value in self._updates.items()}
        self._successors.pop(new, None)
        self._successors[old] = new

    def _refuse_removed_uses(self) -> None:
        alive = {value for node in self._nodes for value in node.outputs} | set(self._params)
        gone = self._removed - alive
        uses = [(f"%{node.name}", value) for node in self._nodes for value in node.inputs]
        uses += [(f"output '{name}'", value) for name, value in self._outputs.items()]
        uses += [(f"the update of state '{name}'", value) for name, value in self._updates.items()]
        for user, value in uses:
            if value in gone:
                raise GraphError(f"{value} was removed from graph '{self._graph.name}', but {user} still uses it")


def common_scope(nodes: Sequence[Node]) -> str:
    """The innermost scope that ``nodes`` share; the outermost one is empty."""
    shared = []
    for column in zip(*(node.scope.split(".") for node in nodes)):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _origins(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Names of the values that the nodes were first built as, without repeats."""
    found = [name for node in nodes for name in (node.origins or tuple(value.name for value in node.outputs))]
    return tuple(dict.fromkeys(found))
