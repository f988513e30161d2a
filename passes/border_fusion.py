"""Border fusion: the last add of a layer and the first norm of the next one become one op, by another signature for the layers.

A body ``x -> out`` that begins with ``rms_norm(x)`` and ends with ``add(residual, delta)`` becomes ``(x, delta) -> (x, delta)``: it
begins with ``add_rms_norm(x, delta)`` and leaves its last add to what follows. The first layer gets zeros for delta; the final
norm does the last add; who else reads a layer's output gets an ``add`` of its own, which is dead code where nobody asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.rewriter import Rewriter
from deltaloom.ops.elementwise import Add, ZerosLike
from deltaloom.ops.fused_norm import AddRMSNorm
from deltaloom.ops.norm import RMSNorm
from deltaloom.ops.shape import TakeLast
from deltaloom.passes.pipeline import Context, Event, Pass

Pair = tuple[Value, Value]
"""A value as residual and delta: it is their sum."""


@dataclass(frozen=True)
class BorderFusion(Pass):
    """Change the signature of every layer body of the known shape, so that residual adds and norms fuse across layers."""

    name = "border_fusion"
    requires = ("canonical",)
    establishes = ("borders_fused",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        borders: dict[str, Border] = {}
        for name, region in graph.regions.items():
            found = find_border(region)
            if isinstance(found, str):
                ctx.events.append(Event("refused", self.name, graph.name, name, found))
            elif not ctx.fuel.burn():
                ctx.events.append(Event("out of fuel", self.name, graph.name, name, "the number of rewrites is limited"))
            else:
                borders[name] = found
                ctx.events.append(Event("hit", self.name, graph.name, name, f"%{found.last.name} moves into the next layer's norm"))
        if not borders:
            return graph
        opened = {name: _body(graph.region(name), border, self.name) for name, border in borders.items()}
        return _Top(graph, {**graph.regions, **opened}, borders).result(self.name)


@dataclass(frozen=True)
class Border:
    """Where a body can be opened: its input ``x``, which ``norm`` reads, and its output, the sum ``last`` of ``residual`` and
    ``delta``."""

    x: Value
    norm: Node
    last: Node
    residual: Value
    delta: Value


def find_border(region: Graph) -> Border | str:
    """The border of a body, or why it has none."""
    if len(region.outputs) != 1:
        return f"it has {len(region.outputs)} outputs, expected one"
    (out,) = (value for _, value in region.outputs)
    last = region.producers.get(out.name) if out.kind == "node" else None
    if last is None or not isinstance(last.op, Add):
        return f"its output {out} is made by {last.op.name if last else 'nothing'}, expected add"
    if region.users.get(out) or out in dict(region.updates).values():
        return f"its output {out} is used inside too"
    norms = [node for node in region.nodes if isinstance(node.op, RMSNorm) and node.inputs[0] in region.inputs]
    if len(norms) != 1:
        return f"{len(norms)} of its nodes are an rms_norm of an input, expected one"
    x = norms[0].inputs[0]
    stream = _stream(region, x)
    residuals = [value for value in last.inputs if value in stream]
    if len(residuals) != 1:
        return f"{len(residuals)} of the inputs of %{last.name} = add carry {x} on, expected one"
    (residual,) = residuals
    delta = last.inputs[1] if last.inputs[0] == residual else last.inputs[0]
    return Border(x, norms[0], last, residual, delta)


def _stream(region: Graph, x: Value) -> set[Value]:
    """``x`` and every sum of it."""
    stream = {x}
    for node in region.nodes:
        if isinstance(node.op, (Add, AddRMSNorm)) and stream.intersection(node.inputs[:2]):
            stream.add(node.outputs[0])
    return stream


def _body(region: Graph, border: Border, after: str) -> Graph:
    rewriter = Rewriter(region)
    taken = {value.name for value in (*region.inputs, *region.params)} | set(region.producers)
    delta = rewriter.add_input(free_name("delta", taken), border.x.type, after=border.x)
    total = _fused_norm(rewriter, region, border.norm, (border.x, delta), name=f"{border.x.name}.sum")
    rewriter.replace(border.x, total)
    rewriter.set_outputs({"x": border.residual, "delta": border.delta})
    rewriter.remove(border.last)
    return rewriter.result(after=after)


def _fused_norm(rewriter: Rewriter, graph: Graph, norm: Node, pair: Pair, *, name: str) -> Value:
    """Put ``add_rms_norm`` of ``pair`` in the place of ``norm``; gives the sum, called ``name``."""
    assert isinstance(norm.op, RMSNorm)
    behind = graph.nodes.index(norm) + 1
    before = graph.nodes[behind] if behind < len(graph.nodes) else None
    op = AddRMSNorm(eps=norm.op.eps, zero_centred=norm.op.zero_centred)
    rewriter.remove(norm)
    total, normed = rewriter.insert_all(op, [*pair, norm.inputs[1]], names=[name, norm.name], before=before, replaces=[norm])
    rewriter.replace(norm.outputs[0], normed)
    return total


class _Top:
    """The top level over opened bodies. ``pairs`` holds, for a value of the old graph, the two that it is the sum of."""

    def __init__(self, graph: Graph, regions: Mapping[str, Graph], borders: Mapping[str, Border]) -> None:
        self._graph = graph
        self._regions = regions
        self._borders = borders
        self._rewriter = Rewriter(graph)
        self._rewriter.set_regions(regions)
        self._pairs: dict[Value, Pair] = {}
        self._read: set[tuple[str, Value]] = set()
        """Node and value, where the node reads the two parts of the value instead."""

    def result(self, after: str) -> Graph:
        opened = []
        for node in self._graph.nodes:
            if isinstance(node.op, Call) and node.op.region in self._borders:
                self._call(node, node.op)
                opened.append(node)
            elif isinstance(node.op, TakeLast) and node.inputs[0] in self._pairs:
                self._take_last(node)
                opened.append(node)
            elif isinstance(node.op, RMSNorm) and node.inputs[0] in self._pairs:
                self._read.add((node.name, node.inputs[0]))
                _fused_norm(self._rewriter, self._graph, node, self._pairs[node.inputs[0]], name=f"{node.name}.sum")
        for node in reversed(opened):
            self._close(node)
        return self._rewriter.result(after=after)

    def _call(self, node: Node, call: Call) -> None:
        region = self._graph.region(call.region)
        position = region.inputs.index(self._borders[call.region].x)
        x = node.inputs[position]
        if x in self._pairs:
            if node.inputs.count(x) == 1:
                self._read.add((node.name, x))
        else:
            zeros = self._rewriter.insert(ZerosLike(), [x], name=f"{x.name}.zeros", before=node, replaces=[node])
            self._pairs[x] = (x, zeros)
        inputs = [*node.inputs[:position], *self._pairs[x], *node.inputs[position + 1 :]]
        base = node.name.rpartition(".")[0] or node.name
        names = [f"{base}.{name}" for name, _ in self._regions[call.region].outputs]
        made = self._rewriter.insert_all(call, inputs, names=names, before=node, replaces=[node])
        self._pairs[node.outputs[0]] = (made[0], made[1])

    def _take_last(self, node: Node) -> None:
        x = node.inputs[0]
        self._read.add((node.name, x))
        residual, delta = (
            self._rewriter.insert(node.op, [value], name=f"{node.name}.{part}", before=node, replaces=[node])
            for value, part in zip(self._pairs[x], ("x", "delta"))
        )
        self._pairs[node.outputs[0]] = (residual, delta)

    def _close(self, node: Node) -> None:
        """Take the old node out; where somebody reads its value as a whole, the sum has its place and name."""
        value = node.outputs[0]
        readers = [user for user in self._graph.users.get(value, ()) if (user.name, value) not in self._read]
        if not readers and value not in self._graph.results:
            self._rewriter.remove(node)
            return
        total = self._rewriter.insert(Add(), self._pairs[value], name=f"{value.name}.sum", before=node, replaces=[node])
        self._rewriter.replace(value, total)
        self._rewriter.remove(node)
        self._rewriter.rename(total, value.name)
