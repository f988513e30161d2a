"""Canonicalise: what changes nothing goes, chains become one step, equal computations are made once, dead code goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deltaloom.graph.dead_code import dead_code_elimination
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Op
from deltaloom.graph.rewriter import Rewriter
from deltaloom.graph.types import TensorType
from deltaloom.ops.elementwise import Cast
from deltaloom.ops.shape import Concat, Flatten, Reshape, Split, Transpose, Unflatten
from deltaloom.passes.pipeline import Context, Pass

LOSSLESS = {
    "f8_e4m3": ("f16", "bf16", "f32", "f64"),
    "f16": ("f32", "f64"),
    "bf16": ("f32", "f64"),
    "f32": ("f64",),
    "i8": ("i32", "i64"),
    "u8": ("i32", "i64"),
    "i32": ("i64",),
}
"""Casts that keep every value: dtype -> dtypes that hold all of it."""


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Bring a graph into its one plain form: no idle step, no chain that one step does, no repeated computation, no dead node."""

    name = "canonicalise"
    establishes = ("canonical",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return dead_code_elimination(self.each(graph, ctx))

    def region(self, graph: Graph, ctx: Context) -> Graph:
        simpler = _simplified(_with_plain_axes(graph), self.name)
        while (merged := _merge_one_split(simpler, self.name)) is not None:
            simpler = merged
        return simpler


def _with_plain_axes(graph: Graph) -> Graph:
    """The last axis of splits and concats is -1, any other one counts from the front."""

    def plain(node: Node) -> Node:
        op = node.op
        if not isinstance(op, (Split, Concat)):
            return node
        rank = node.inputs[0].type.rank
        axis = -1 if op.axis % rank == rank - 1 else op.axis % rank
        return node if axis == op.axis else replace(node, op=replace(op, axis=axis))

    nodes = tuple(map(plain, graph.nodes))
    return graph if nodes == graph.nodes else replace(graph, nodes=nodes)


def _simplified(graph: Graph, name: str) -> Graph:
    rewriter = Rewriter(graph)
    makers: dict[Value, Node] = {}
    seen: dict[tuple[Op, tuple[Value, ...]], tuple[Value, ...]] = {}
    changed = False
    for node in graph.nodes:
        here = replace(node, inputs=tuple(rewriter.current(value) for value in node.inputs))
        short = False
        while (shorter := _shorter(here, makers)) is not None:
            here, short = shorter, True
        results = _same_as(here, makers) or seen.get((here.op, here.inputs))
        if results is not None:
            for old, new in zip(node.outputs, results, strict=True):
                rewriter.replace(old, new)
            rewriter.remove(node)
            changed = True
            continue
        if short:
            rewriter.change(node, here.op, here.inputs)
            changed = True
        makers.update(dict.fromkeys(node.outputs, here))
        if not isinstance(here.op, Call) and not here.op.updates:
            seen[here.op, here.inputs] = node.outputs
    return rewriter.result(after=name) if changed else graph


def _same_as(node: Node, makers: dict[Value, Node]) -> tuple[Value, ...] | None:
    """Values that are what ``node`` computes, if it does nothing, or puts together what was cut, or cuts what was put together."""
    op = node.op
    if _idle(node):
        return node.inputs
    maker = makers.get(node.inputs[0]) if node.inputs else None
    if maker is None:
        return None
    if isinstance(op, Concat) and isinstance(maker.op, Split) and maker.op.axis == op.axis:
        return maker.inputs if node.inputs == maker.outputs else None
    if isinstance(op, Split) and isinstance(maker.op, Concat) and maker.op.axis == op.axis:
        return maker.inputs if op.sizes == tuple(value.type.shape[op.axis] for value in maker.inputs) else None
    return None


def _idle(node: Node) -> bool:
    op = node.op
    if isinstance(op, (Cast, Reshape, Flatten, Unflatten, Concat, Split)):
        return len(node.inputs) == len(node.outputs) == 1 and node.inputs[0].type == node.outputs[0].type
    return isinstance(op, Transpose) and op.axes == tuple(range(len(op.axes)))


def _shorter(node: Node, makers: dict[Value, Node]) -> Node | None:
    """The same computed from what the maker of the first input reads, if the two are one step."""
    maker = makers.get(node.inputs[0]) if node.inputs else None
    if maker is None or len(maker.inputs) != 1:
        return None
    rule = _CHAINS.get((type(maker.op), type(node.op)))
    op = rule(maker.op, node.op, maker.inputs[0].type) if rule is not None else None
    return None if op is None else replace(node, op=op, inputs=maker.inputs)


def _last(first: Op, second: Op, x: TensorType) -> Op:
    """The second alone: it says all of the result."""
    return second


def _cast_of_cast(first: Op, second: Op, x: TensorType) -> Op | None:
    assert isinstance(first, Cast)
    wider = first.infer(x).plain_dtype
    return second if wider.name in LOSSLESS.get(str(x.dtype), ()) else None


def _composed(first: Op, second: Op, x: TensorType) -> Op:
    assert isinstance(first, Transpose) and isinstance(second, Transpose)
    return Transpose(tuple(first.axes[axis] for axis in second.axes))


def _unflatten_of_flatten(first: Op, second: Op, x: TensorType) -> Op | None:
    assert isinstance(first, Flatten) and isinstance(second, Unflatten)
    return Flatten(1) if x.shape[x.rank - first.axes :] == second.sizes else None


def _flatten_of_unflatten(first: Op, second: Op, x: TensorType) -> Op | None:
    assert isinstance(first, Unflatten) and isinstance(second, Flatten)
    extra = second.axes - len(first.sizes)
    return Flatten(1 + extra) if extra >= 0 else None


Chain = Callable[[Op, Op, TensorType], Op | None]
_CHAINS: dict[tuple[type[Op], type[Op]], Chain] = {
    (Reshape, Reshape): _last,
    (Flatten, Reshape): _last,
    (Unflatten, Reshape): _last,
    (Transpose, Transpose): _composed,
    (Cast, Cast): _cast_of_cast,
    (Flatten, Unflatten): _unflatten_of_flatten,
    (Unflatten, Flatten): _flatten_of_unflatten,
}
"""Ops of a maker and of its reader -> the one op that does both on the maker's input (``flatten`` of 1 axis is none), or None."""


def _merge_one_split(graph: Graph, name: str) -> Graph | None:
    """The graph with one pair of splits merged, of which the second cuts a part that nothing else reads; None if there is none."""
    for node in graph.nodes:
        outer = graph.producers.get(node.inputs[0].name) if isinstance(node.op, Split) else None
        if outer is None or not isinstance(outer.op, Split) or not isinstance(node.op, Split):
            continue
        part = node.inputs[0]
        if part.kind != "node" or outer.op.axis != node.op.axis or graph.users[part] != (node,) or part in graph.results:
            continue
        position = outer.outputs.index(part)
        sizes = (*outer.op.sizes[:position], *node.op.sizes, *outer.op.sizes[position + 1 :])
        values = (*outer.outputs[:position], *node.outputs, *outer.outputs[position + 1 :])
        rewriter = Rewriter(graph)
        for gone in (outer, node):
            rewriter.remove(gone)
        behind = next((n for n in graph.nodes[graph.nodes.index(outer) + 1 :] if n is not node), None)
        names = [value.name for value in values]
        rewriter.insert_all(Split(sizes, node.op.axis), outer.inputs, names=names, before=behind, replaces=(outer, node))
        return rewriter.result(after=name)
    return None
