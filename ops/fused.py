"""The base of fused ops: several smaller ops under one name, so that a backend can run them as one kernel.

A fused op has no meaning of its own: its types, its cost and its reference are those of its decomposition. Backends offer no
portable kernel for it; where no accelerated kernel takes one, it is taken apart.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import interpret, type_of
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Cost, Op
from deltaloom.graph.types import TensorType


class Fused(Op):
    """An op whose ``decompose`` says everything. Subclasses give ``infer`` as ``return self.types(...)``."""

    def types(self, *types: TensorType) -> tuple[TensorType, ...]:
        """The output types, from the decomposition; ``GraphError`` where a part refuses its inputs."""
        return tuple(value.type for _, value in parts(self, types).outputs)

    def reference(self, *arrays: Any) -> Any:
        """The decomposition, interpreted."""
        graph = parts(self, tuple(map(type_of, arrays)))
        named = {value.name: array for value, array in zip(graph.inputs, arrays, strict=True)}
        results = tuple(interpret(graph, named, _no_params, {}).outputs.values())
        return results[0] if len(results) == 1 else results

    def cost(self, *types: TensorType) -> Cost:
        """FLOPs of the parts; bytes of the inputs and outputs alone, which is what fusing is for, less what a part leaves untouched
        of them: experts that no token reaches, the filled entries of a cache in its new value."""
        graph = parts(self, types)
        flops: Dim = 0
        untouched: Dim = 0
        for node in graph.nodes:
            given = [value.type for value in node.inputs]
            cost = node.op.cost(*given)
            flops = flops + cost.flops
            if cost.bytes != 0:  # a view
                untouched = untouched + node.op.moved_bytes(*given) - cost.bytes
        return Cost(flops, self.moved_bytes(*types) - untouched)

    def reads(self, *types: TensorType) -> dict[str, Fraction]:
        """What the parts read of the inputs."""
        graph = parts(self, types)
        names = dict(zip(graph.inputs, self.input_names(), strict=False))
        found: dict[str, Fraction] = {}
        for node in graph.nodes:
            given = dict(zip(node.op.input_names(), node.inputs, strict=False))
            shares = node.op.reads(*(value.type for value in node.inputs))
            found |= {names[given[name]]: share for name, share in shares.items() if given[name] in names}
        return found


@lru_cache(maxsize=256)
def decomposition(op: Op, types: tuple[TensorType, ...]) -> Graph | None:
    """The parts of any op for inputs ``in0``, ``in1``, … of these types as a graph of its own, with outputs ``0``, ``1``, …; None
    where it has none."""
    builder = GraphBuilder(op.name)
    values = [builder.input(f"in{position}", type_) for position, type_ in enumerate(types)]
    made = None if op.decompose is None else op.decompose(builder, *values)
    if made is None:
        return None
    for position, value in enumerate(made if isinstance(made, tuple) else (made,)):
        builder.output(str(position), value)
    return builder.build()


def parts(op: Op, types: tuple[TensorType, ...]) -> Graph:
    """``decomposition``, which a fused op has; ``GraphError`` where it gives none."""
    found = decomposition(op, types)
    if found is None:
        raise GraphError(f"op {op.name} has no decomposition for {', '.join(map(str, types))}")
    return found


def _no_params(name: str) -> Any:
    raise GraphError(f"a decomposition has no parameters, but '{name}' was asked for")
