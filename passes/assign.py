"""Assign: every node gets the first kernel that accepts it, in the configured order; who refused, and why, stays in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Call, Graph, Node, Placement, Refusal, Value
from deltaloom.graph.rewriter import Rewriter
from deltaloom.ops.fused import Fused, decomposition
from deltaloom.passes.kernel import Kernel, kernels_for
from deltaloom.passes.pipeline import Context, Event, Pass

LayoutKey = tuple[str, str, str]
"""Graph or region name, weight name and backend."""


@dataclass(frozen=True)
class Assign(Pass):
    """Place every node on a backend: claim or descend into its decomposition.

    ``layouts`` holds decisions of prepack: a kernel that wants a weight otherwise is refused with that as the reason.
    """

    name = "assign"
    requires = ("lifted",)
    establishes = ("assigned",)
    given = ("layouts",)
    layouts: Mapping[LayoutKey, tuple[int, ...]] = field(default_factory=dict)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return self.each(graph, ctx)

    def region(self, graph: Graph, ctx: Context) -> Graph:
        while unplaced := [n for n in graph.nodes if n.placement is None and not isinstance(n.op, Call)]:
            placed: dict[str, Placement] = {}
            rewriter = Rewriter(graph)
            descended = False
            for node in unplaced:
                choice = self._place(node, graph.name, ctx)
                if choice is not None:
                    placed[node.name] = choice
                else:
                    _descend(rewriter, node)
                    descended = True
            if descended:
                graph = rewriter.result(after=self.name)
            nodes = (replace(n, placement=placed[n.name]) if n.name in placed else n for n in graph.nodes)
            graph = replace(graph, nodes=tuple(nodes))
        return graph

    def _place(self, node: Node, graph_name: str, ctx: Context) -> Placement | None:
        """The placement of ``node``, None to descend; ``CompileError`` lists every refusal where neither is possible."""
        refusals: list[Refusal] = []
        override = _override_inside(node, ctx)
        for backend in order_for(node, ctx):
            found = candidates(node, backend, ctx)
            if not found:
                refusals.append(Refusal(backend, f"has no kernel for {node.op.name}"))
            for kernel in found:
                reason = override or kernel.refusal(node) or self._layout_refusal(kernel, node, graph_name)
                if reason is None:
                    return Placement(kernel.backend, kernel.name, tuple(refusals), kernel.layouts(node))
                refusals.append(Refusal(kernel.name, reason))
        if parts_of(node) is not None:
            why = "; ".join(map(str, refusals))
            ctx.events.append(Event("taken apart", node.op.name, graph_name, node.name, why))
            return None
        lines = "".join(f"\n  {r.kernel}: {r.reason}" for r in refusals)
        order = ", ".join(order_for(node, ctx))
        raise CompileError(f"nobody can run %{node.name} = {node.op} (backends {order}), built at {node.source}:{lines}")

    def _layout_refusal(self, kernel: Kernel, node: Node, graph_name: str) -> str | None:
        wanted = dict(kernel.layouts(node))
        for position, axes in wanted.items():
            value = node.inputs[position]
            if value.kind != "param":
                return f"wants {value} stored as {axes}, but it is computed, not a weight"
        for position, value in enumerate(node.inputs):
            if value.kind != "param" or not self.layouts:
                continue
            plain = tuple(range(value.type.rank))
            decided = self.layouts.get((graph_name, value.name, kernel.backend))
            if decided is not None and decided != wanted.get(position, plain):
                return f"wants {value} stored as {wanted.get(position, plain)}, but prepack decided {decided}"
        return None


def order_for(node: Node, ctx: Context) -> tuple[str, ...]:
    """The backends to ask for a node, in order: its op's override, otherwise the configured order."""
    return tuple(ctx.config.kernels.get(node.op.name, tuple(backend.name for backend in ctx.backends)))


def _override_inside(node: Node, ctx: Context) -> str | None:
    """Why ``node`` has to be taken apart: the configuration says for one of its parts, and not for itself, who runs it."""
    if not ctx.config.kernels or node.op.name in ctx.config.kernels:
        return None
    parts = parts_of(node) if isinstance(node.op, Fused) else None
    for part in parts.nodes if parts else ():
        if part.op.name in ctx.config.kernels:
            return f"kernels.{part.op.name} is set, and {node.op.name} contains that op; set kernels.{node.op.name} too to keep it"
        if (reason := _override_inside(part, ctx)) is not None:
            return reason
    return None


def candidates(node: Node, backend: str, ctx: Context) -> list[Kernel]:
    """Every kernel that a backend has for the op of ``node``."""
    return kernels_for(ctx.backend(backend), node.op.name, first=ctx.config.use.get(f"kernels.{backend}"))


def parts_of(node: Node) -> Graph | None:
    """The parts of a node; None where its op has none."""
    return decomposition(node.op, tuple(value.type for value in node.inputs))


def _descend(rewriter: Rewriter, node: Node) -> None:
    """Put the decomposition of ``node`` in its place."""
    parts = parts_of(node)
    assert parts is not None
    here: dict[Value, Value] = dict(zip(parts.inputs, node.inputs, strict=True))
    for part in parts.nodes:
        names = [f"{node.name}.{value.name}" for value in part.outputs]
        made = rewriter.insert_all(part.op, [here[v] for v in part.inputs], names=names, before=node, replaces=[node])
        here.update(zip(part.outputs, made, strict=True))
    for old, (_, new) in zip(node.outputs, parts.outputs, strict=True):
        rewriter.replace(old, here[new])
    rewriter.remove(node)
