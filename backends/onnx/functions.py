"""The functions of a model: one for each op and what its ``onnx`` rule makes of it, shared by all nodes that need the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx
from onnx import helper

from deltaloom.backends.onnx.body import Body
from deltaloom.backends.onnx.profiles import Profile
from deltaloom.graph.errors import ExportError
from deltaloom.graph.ir import Value
from deltaloom.graph.op import Op
from deltaloom.graph.types import TensorType
from deltaloom.ops.fused import decomposition

DOMAIN = "deltaloom"
"""Where the functions live, in version 1."""


class Library:
    """Functions made so far. ``profile`` says which ops bodies may use."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._made: dict[tuple[Op, tuple[TensorType, ...]], tuple[str, dict[str, Any], tuple[TensorType, ...]]] = {}
        self._by_body: dict[tuple[str, bytes], str] = {}
        self.functions: dict[str, onnx.FunctionProto] = {}

    def call(self, body: Body, op: Op, names: Sequence[str]) -> tuple[str, ...]:
        """Add a call of the function of ``op`` to ``body``, whose values ``names`` must have known types."""
        types = tuple(body.type(name) for name in names)
        function, attributes, results = self.function(op, types)
        made = body.node(function, list(names), len(results), domain=DOMAIN, **attributes)
        body.types.update(zip(made, results, strict=True))
        body.dtypes.update(zip(made, (result.plain_dtype for result in results), strict=True))
        return made

    def function(self, op: Op, types: tuple[TensorType, ...]) -> tuple[str, dict[str, Any], tuple[TensorType, ...]]:
        """The name of the function for ``op`` on inputs of these types, the attributes that a call gives, and the output types.
        ``ExportError`` if neither the op nor its decomposition has a rule."""
        key = (op, types)
        if key not in self._made:
            results = op.output_types(*types)
            inputs = input_names(op, len(types))
            known = dict(zip(inputs, types, strict=True))
            body = Body(self, known, {name: type_.plain_dtype for name, type_ in known.items()}, attributes=op.attributes())
            outputs = output_names(op, len(results))
            for name in (*inputs, *outputs):
                body.name(name)
            given = self._build(body, op, inputs, types)
            made = [body.Identity(value) for value in given]
            for node, new in zip(body.nodes[len(body.nodes) - len(made) :], outputs, strict=True):
                node.output[0], node.name = new, f"give_{new}"
            self._made[key] = (self._add(op, inputs, outputs, body), dict(body.used), results)
        return self._made[key]

    def _build(self, body: Body, op: Op, inputs: Sequence[str], types: tuple[TensorType, ...]) -> tuple[str, ...]:
        """The names of the results, of the op's own rule or of its decomposition."""
        if op.onnx is not None:
            given = op.onnx(body, *inputs)
            return given if isinstance(given, tuple) else (given,)
        graph = decomposition(op, types)
        if graph is None:
            raise ExportError(f"op {op.name} has neither an onnx rule nor a decomposition")
        names: dict[Value, str] = dict(zip(graph.inputs, inputs, strict=True))
        for node in graph.nodes:
            made = self.call(body, node.op, [names[value] for value in node.inputs])
            names.update(zip(node.outputs, made, strict=True))
        return tuple(names[value] for _, value in graph.outputs)

    def _add(self, op: Op, inputs: Sequence[str], outputs: Sequence[str], body: Body) -> str:
        """Put the function of ``op`` into the model, under a name of its own if there is another body of that op."""
        domains = sorted(domains_of(body.nodes) - {""})
        imports = [helper.make_opsetid("", self.profile.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        doc = (type(op).__doc__ or "").strip().splitlines()
        made = helper.make_function(
            DOMAIN, type(op).__name__, inputs, outputs, body.nodes, imports, list(body.used), doc_string=doc[0] if doc else ""
        )
        key = (made.name, made.SerializeToString(deterministic=True))
        if key not in self._by_body:
            count = sum(name == made.name for name, _ in self._by_body)
            self._by_body[key] = made.name if count == 0 else f"{made.name}_{count + 1}"
            made.name = self._by_body[key]
            self.functions[made.name] = made
        return self._by_body[key]


def domains_of(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """The domains of nodes, and of those in the bodies of Scan, Loop and If."""
    found = set()
    for node in nodes:
        found |= {node.domain}.union(*(domains_of(attribute.g.node) for attribute in node.attribute))
    return found


def input_names(op: Op, count: int) -> list[str]:
    """Names of the inputs of a function; those of a variadic op are numbered."""
    names = list(op.input_names())
    return names[:count] if count <= len(names) else [*names[:-1], *(f"{names[-1]}{i}" for i in range(count - len(names) + 1))]


def output_names(op: Op, count: int) -> list[str]:
    """Names of the outputs of a function."""
    names = list(op.outputs)
    return names[:count] if count <= len(names) else [f"{names[0]}{i}" for i in range(count)]
