"""All ranks of a mesh in one process, in lock step: the graph that they share is interpreted node by node, for every rank.

It is how a sharded graph runs here, and the proof that it computes what one rank would: what the ranks must have in common is
compared, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import run_node
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.ops.collectives import Collective, OfRank
from deltaloom.passes.shard.plan import Mesh, check_mesh
from deltaloom.runtime.weights import TensorSource, materialise

States = Mapping[str, Array]
"""The states of one rank, by full name."""
Observer = Callable[[str, Value, Sequence[Any]], None]
"""Sees each value by its full name, with the arrays of all ranks."""


@dataclass
class LockStepResults:
    """Outputs by name, which all ranks have in common, and the new states of each rank."""

    outputs: dict[str, Array] = field(default_factory=dict)
    states: list[dict[str, Array]] = field(default_factory=list)


class LockStep:
    """A graph of one rank, run for all ranks of ``mesh``. Ranks count with the last axis of the mesh fastest."""

    def __init__(self, graph: Graph, mesh: Mesh, source: TensorSource) -> None:
        """``graph`` comes from the shard pass for ``mesh``, its weights lifted; ``source`` has the checkpoint's whole tensors."""
        axes = check_mesh(mesh) or {"tp": 1}
        self.graph = graph
        self.axes = tuple(axes)
        self.coordinates = list(product(*(range(ranks) for ranks in axes.values())))
        self._source = source
        self._weights: dict[tuple[str, str], list[Any]] = {}

    def start(self, batch: int) -> list[dict[str, Array]]:
        """Every rank's states before the first token: zeros, caches empty."""
        sizes = {"batch": batch, "past": 0}
        types = {name: state.value.type.substitute(sizes) for name, state in self.graph.all_states().items()}
        return [
            {name: np.zeros(type_.static_shape(), type_.plain_dtype.numpy) for name, type_ in types.items()}
            for _ in self.coordinates
        ]

    def run(self, inputs: Mapping[str, Array], states: Sequence[States], observe: Observer | None = None) -> LockStepResults:
        """One run on all ranks; the states given are not changed. Raises ``GraphError`` for a missing input, and where the ranks
        differ in an output."""
        missing = [value for value in self.graph.inputs if value.name not in inputs]
        if missing:
            raise GraphError(f"graph '{self.graph.name}' needs the input '{missing[0].name}', which was not given")
        arguments = [[inputs[value.name]] * len(self.coordinates) for value in self.graph.inputs]
        results = LockStepResults(states=[{} for _ in self.coordinates])
        outputs = self._graph(self.graph, arguments, "", states, results.states, observe)
        for (name, _), arrays in zip(self.graph.outputs, outputs, strict=True):
            for rank, array in enumerate(arrays):
                if not np.array_equal(array, arrays[0], equal_nan=True):
                    raise GraphError(f"output '{name}' of '{self.graph.name}' is not the same on rank {rank} as on rank 0")
            results.outputs[name] = arrays[0]
        return results

    def _graph(
        self,
        graph: Graph,
        arguments: list[list[Any]],
        prefix: str,
        states: Sequence[States],
        new_states: list[dict[str, Array]],
        observe: Observer | None,
    ) -> list[list[Any]]:
        values: dict[Value, list[Any]] = dict(zip(graph.inputs, arguments, strict=True))
        values.update({value: self._weight(graph, value, prefix) for value in graph.params})
        values.update({state.value: [own[prefix + state.name] for own in states] for state in graph.states})
        for node in graph.nodes:
            given = [values[value] for value in node.inputs]
            if isinstance(node.op, Call):
                region = self.graph.region(node.op.region)
                made = self._graph(region, given, node.op.prefix, states, new_states, observe)
            else:
                with np.errstate(all="ignore"):
                    made = self._node(node, given)
            for value, arrays in zip(node.outputs, made, strict=True):
                values[value] = arrays
                if observe is not None:
                    observe(prefix + value.name, value, arrays)
        for name, value in graph.updates:
            for own, array in zip(new_states, values[value]):
                own[prefix + name] = array
        return [values[value] for _, value in graph.outputs]

    def _node(self, node: Node, given: list[list[Any]]) -> list[list[Any]]:
        """The outputs of a node, each on all ranks."""
        op = node.op
        if isinstance(op, Collective):
            return [self._exchange(op, given[0])]
        if isinstance(op, OfRank):
            digit = self.axes.index(op.mesh)
            return [[op.on_rank(own[digit], x) for own, x in zip(self.coordinates, given[0])]]
        each = [run_node(node, [arrays[rank] for arrays in given]) for rank in range(len(self.coordinates))]
        return [list(arrays) for arrays in zip(*each, strict=True)]

    def _exchange(self, op: Collective, arrays: list[Any]) -> list[Any]:
        """A collective among the ranks that differ in its mesh axis alone."""
        digit = self.axes.index(op.mesh)
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, own in enumerate(self.coordinates):
            groups.setdefault((*own[:digit], *own[digit + 1 :]), []).append(rank)
        found: dict[int, Any] = {}
        for ranks in groups.values():
            found.update(zip(ranks, op.together([arrays[rank] for rank in ranks]), strict=True))
        return [found[rank] for rank in range(len(arrays))]

    def _weight(self, graph: Graph, value: Value, prefix: str) -> list[Any]:
        if graph.weights is None:
            raise GraphError(f"graph '{graph.name}' has parameters, but its weights are not lifted; run lift_weights after shard")
        key = (prefix, value.name)
        if key not in self._weights:
            own = [bind_rank(graph.weights, dict(zip(self.axes, at))) for at in self.coordinates]
            self._weights[key] = [materialise(w, w.output(value.name), prefix, self._source, ()) for w in own]
        return self._weights[key]


def bind_rank(graph: Graph, coordinates: Mapping[str, int]) -> Graph:
    """``graph`` for the rank at these ``coordinates`` (mesh axis -> rank along it): its rank-dependent ops know theirs."""

    def bound(node: Node) -> Node:
        if not isinstance(node.op, OfRank) or node.op.mesh not in coordinates:
            return node
        return replace(node, op=replace(node.op, rank=coordinates[node.op.mesh]))

    return replace(graph, nodes=tuple(map(bound, graph.nodes)))
