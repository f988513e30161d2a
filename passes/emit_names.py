"""The global names of an emitted program, and the header that defines them where the source is pasted into a file."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, field
from typing import Any

from deltaloom.graph.ir import Graph, Node
from deltaloom.graph.naming import free_name
from deltaloom.graph.op import Op
from deltaloom.passes.kernel import find_kernel
from deltaloom.passes.pipeline import Context
from deltaloom.passes.segment import TRANSFER


@dataclass
class Names:
    """Python names of functions, ops, kernels and backends, and the objects behind them."""

    values: dict[str, Any] = field(default_factory=dict)
    ops: dict[Op, str] = field(default_factory=dict)
    kernels: dict[tuple[str, str, str], str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def function(self, name: str) -> str:
        """The function of a graph, a region or a segment."""
        return identifier(name)

    def segment(self, graph: Graph, number: int) -> str:
        """The function of the ``number``-th run of nodes of a graph."""
        return self.function(f"{graph.name}_{number}")

    def op(self, op: Op) -> str:
        """An op with its attributes."""
        if op not in self.ops:
            numbered = identifier(f"{op.name}_{sum(other.name == op.name for other in self.ops)}")
            self.ops[op] = free_name(numbered, self.values)
            self.values[self.ops[op]] = op
        return self.ops[op]

    def kernel(self, node: Node, ctx: Context) -> str:
        """The kernel that a placed node got."""
        assert node.placement is not None
        key = (node.placement.backend, node.op.name, node.placement.kernel)
        if key not in self.kernels:
            backend, op, kernel = key
            title = kernel.removeprefix(backend + ".")
            told = f"{backend}_{title}" if title.startswith(op) else f"{backend}_{op}_{title}"
            name = free_name(identifier(told), self.values)
            self.kernels[key] = name
            self.values[name] = find_kernel(ctx.backend(backend), op, kernel)
        return self.kernels[key]

    def backend(self, name: str, ctx: Context) -> str:
        """A backend that a transfer speaks to."""
        self.values[name] = ctx.backend(name)
        return name

    def reserve(self, graph: Graph, ctx: Context) -> None:
        """Name whatever the functions of a placed program will use, so that no value in them gets the same name."""
        for body in (*graph.regions.values(), graph):
            self.taken.update([self.function(body.name), *(self.segment(body, number) for number in range(len(body.nodes)))])
            for node in body.nodes:
                if node.placement is not None and node.op.name != TRANSFER:
                    self.op(node.op)
                    self.kernel(node, ctx)
        self.taken.update(self.values, (backend.name for backend in ctx.backends))

    def header(self, program: str, ctx: Context) -> list[str]:
        """The lines that define these names when the source stands alone."""
        lines = [f'"""Program {program}, emitted by deltaloom. It runs as it stands."""', ""]
        lines += ["import deltaloom.ops", "from deltaloom.backends import backend", "from deltaloom.graph.registry import ops"]
        lines += ["from deltaloom.passes.kernel import find_kernel", ""]
        used = sorted({key[0] for key in self.kernels} | {b.name for b in ctx.backends if b.name in self.values})
        lines += [f"{name} = backend({name!r}, device={ctx.backend(name).device!r}{_whose(name, ctx)})" for name in used]
        for (owner, title, kernel), name in self.kernels.items():
            lines.append(f"{name} = find_kernel({owner}, {title!r}, {kernel!r})")
        for op, name in self.ops.items():
            values = ", ".join(f"{key}={value!r}" for key, value in op.attributes().items())
            lines.append(f"{name} = ops.get({op.name!r})({values})")
        return [*lines, ""]


def _whose(name: str, ctx: Context) -> str:
    """The argument that says whose backend of that name it is, where the configuration does."""
    key = f"backends.{name}"
    return f", use={{{key!r}: {ctx.config.use[key]!r}}}" if key in ctx.config.use else ""


def identifier(name: str) -> str:
    """A Python name that reads like ``name``."""
    text = re.sub(r"\W", "_", name)
    return f"{text}_" if keyword.iskeyword(text) or not text or text[0].isdigit() else text
