"""Prepack: one storage layout a weight, decided over all programs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaloom.graph.dims import Dim, bounds
from deltaloom.graph.ir import Graph, Node
from deltaloom.passes.assign import LayoutKey

DUPLICATE_BELOW = 1 << 20
"""Bytes: a smaller weight may be stored in several layouts; for a larger one the costlier user decides."""


@dataclass(frozen=True)
class Conflict:
    """A weight that two kernels want in different layouts; the one with less predicted work lost."""

    weight: LayoutKey
    kept: tuple[int, ...]
    lost: tuple[int, ...]
    loser: str

    def __str__(self) -> str:
        graph, name, backend = self.weight
        return f"@{name} of {graph} is stored as {self.kept} for {backend}; {self.loser} wanted {self.lost}"


def decide_layouts(programs: Sequence[Graph]) -> tuple[dict[LayoutKey, tuple[int, ...]], tuple[Conflict, ...]]:
    """Layouts of the weights that placed kernels of ``programs`` disagree about, and who lost.

    The programs are forks of one graph, so equal region names mean the same region. Weights without a conflict, or small enough
    to be stored twice, are not listed.
    """
    wishes: dict[LayoutKey, list[tuple[tuple[int, ...], int, str]]] = {}
    for program in programs:
        for graph in (program, *program.regions.values()):
            for node in graph.nodes:
                for position, axes in _wanted(node).items():
                    value = node.inputs[position]
                    if bounds(value.type.nbytes())[0] < DUPLICATE_BELOW:
                        continue
                    assert node.placement is not None
                    key = (graph.name, value.name, node.placement.backend)
                    wishes.setdefault(key, []).append((axes, _work(node), f"{node.placement.kernel} for %{node.name}"))
    decided: dict[LayoutKey, tuple[int, ...]] = {}
    conflicts: list[Conflict] = []
    for key, wanted in wishes.items():
        if len({axes for axes, _, _ in wanted}) > 1:
            totals: dict[tuple[int, ...], int] = {}
            for axes, work, _ in wanted:
                totals[axes] = totals.get(axes, 0) + work
            best = max(sorted(totals), key=lambda axes: totals[axes])
            decided[key] = best
            conflicts += [Conflict(key, best, axes, who) for axes, _, who in wanted if axes != best]
    return decided, tuple(conflicts)


def _wanted(node: Node) -> dict[int, tuple[int, ...]]:
    """Layout by input position for every weight that the node reads; plain axis order where its kernel has no wish."""
    if node.placement is None:
        return {}
    wanted = dict(node.placement.layouts)
    return {
        position: wanted.get(position, tuple(range(value.type.rank)))
        for position, value in enumerate(node.inputs)
        if value.kind == "param"
    }


def _work(node: Node) -> int:
    """Predicted work of a node at the least size its symbols allow, in FLOPs plus bytes."""
    cost = node.op.cost(*(value.type for value in node.inputs))
    total: Dim = cost.flops + cost.bytes
    return bounds(total)[0]
