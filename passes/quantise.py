"""Quantise: weights of matrix products are stored in quantised types or in bfloat16, which the products then read as they are.

A weight is decided by the checkpoint parameters that it is made of. What is stored quantised can stay so: the ops between the
parameter and the product (splits, stacks, joins) are done on the codes where they keep to the borders of blocks. A packed weight
whose rows come out in several forms is taken apart again: one product for each run of rows, then a concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.graph.rewriter import Rewriter
from deltaloom.graph.types import DType, QuantType, TensorType
from deltaloom.ops.quantized import READERS
from deltaloom.passes.pipeline import Context, Event, Pass
from deltaloom.passes.quantise_policy import Form, Policy, most_exact, scheme_of, scheme_type

ON_CODES = frozenset({"split", "concat", "stack", "reshape"})
"""Ops that can be done on codes and scales."""


@dataclass(frozen=True)
class Quantise(Pass):
    """Give the weights that ``policy`` names the forms it says; with ``keep``, those stored quantised stay as they are.

    A policy is made by ``quantise_policy``. What was done with each weight, and why not more, is noted as events."""

    name = "quantise"
    requires = ("canonical",)
    excludes = ("lifted",)
    establishes = ("quantised",)
    given = ("policy", "keep")
    policy: Policy = ()
    keep: bool = False

    @property
    def idle(self) -> bool:
        return not self.policy and not self.keep

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if self.idle:
            return graph
        regions: dict[str, Graph] = {}
        renamed: dict[str, str] = {}
        for name, region in graph.regions.items():
            prefixes = [node.op.prefix for node in graph.nodes if isinstance(node.op, Call) and node.op.region == name]
            for forms, group in self._groups(region, prefixes).items():
                own = name if name not in regions else free_name(name, {*regions, *graph.regions})
                renamed.update(dict.fromkeys(group, own))
                regions[own] = replace(self._rewritten(region, dict(zip(region.params, forms)), ctx), name=own)
        nodes = (_called(node, renamed) for node in graph.nodes)
        own_forms = {value: self._form("", value) for value in graph.params}
        return self._rewritten(replace(graph, nodes=tuple(nodes), regions=regions), own_forms, ctx)

    def _groups(self, region: Graph, prefixes: Sequence[str]) -> dict[tuple[Form | None, ...], list[str]]:
        """The forms of the parameters of a region -> the prefixes under which they are these."""
        found: dict[tuple[Form | None, ...], list[str]] = {}
        for prefix in prefixes or ("",):
            found.setdefault(tuple(self._form(prefix, value) for value in region.params), []).append(prefix)
        return found

    def _form(self, prefix: str, param: Value) -> Form | None:
        return scheme_type(scheme_of(self.policy, prefix, param.name))

    def _rewritten(self, graph: Graph, forms: dict[Value, Form | None], ctx: Context) -> Graph:
        work = _Work(graph, forms, self.keep, ctx)
        for node in graph.nodes:
            if node.op.name in READERS:
                work.node(node)
        return work.rewriter.result(after=self.name) if work.changed else graph


def _called(node: Node, renamed: dict[str, str]) -> Node:
    if not isinstance(node.op, Call):
        return node
    return replace(node, op=Call(region=renamed[node.op.prefix], prefix=node.op.prefix))


@dataclass(frozen=True)
class _Run:
    """Consecutive rows of a weight that get one form: parts as they are, or (``kept``) their stored codes."""

    form: Form | None
    kept: bool
    parts: tuple[Value, ...]


class _Work:
    """The rewrite of one graph or region."""

    def __init__(self, graph: Graph, forms: dict[Value, Form | None], keep: bool, ctx: Context) -> None:
        self.rewriter = Rewriter(graph)
        self.changed = False
        self._graph = graph
        self._forms = forms
        self._keep = keep
        self._ctx = ctx
        self._sources: dict[Value, frozenset[Value]] = {value: frozenset([value]) for value in graph.params}
        for node in graph.nodes:
            if node.inputs and not isinstance(node.op, Call) and all(value in self._sources for value in node.inputs):
                made = frozenset().union(*(self._sources[value] for value in node.inputs))
                self._sources.update(dict.fromkeys(node.outputs, made))
        self._types: dict[Value, TensorType | str] = {}
        self._quantised: dict[Value, Value] = {}
        self._codes_of: dict[Value, Value] = {}

    def node(self, node: Node) -> None:
        """Give the weights of one product their forms."""
        names = node.op.input_names()
        inputs = list(node.inputs)
        for name in READERS[node.op.name]:
            position = names.index(name)
            weight = inputs[position]
            if weight not in self._sources:
                continue
            runs = self._runs(weight, whole=node.op.name != "linear")
            if len(runs) > 1:
                self._apart(node, runs)
                return
            inputs[position] = self._stored(runs[0], weight, node)
            self._note(node, weight, runs[0])
        if inputs != list(node.inputs):
            self.changed = True
            self.rewriter.change(node, node.op, inputs)

    def _runs(self, weight: Value, *, whole: bool) -> list[_Run]:
        """The weight as runs of one form; ``whole``: as one, in the most exact of its forms."""
        parts = [weight] if whole else self._parts(weight)
        runs: list[_Run] = []
        for part in parts:
            form, kept = self._wanted(part)
            last = runs[-1] if runs else None
            if last and last.form == form and last.kept == kept and (not kept or self._joins((*last.parts, part))):
                runs[-1] = replace(last, parts=(*last.parts, part))
            else:
                runs.append(_Run(form, kept, (part,)))
        return [replace(runs[0], parts=(weight,))] if len(runs) == 1 else runs

    def _parts(self, weight: Value) -> list[Value]:
        """The pieces of rows that a weight is concatenated of."""
        node = self._graph.producers.get(weight.name) if weight.kind == "node" else None
        if node is None or node.op.name != "concat" or int(node.op.axis) % weight.type.rank != 0:  # type: ignore[attr-defined]
            return [weight]
        return [part for value in node.inputs for part in self._parts(value)]

    def _wanted(self, weight: Value) -> tuple[Form | None, bool]:
        """The form of a weight, and whether it is the one that it is stored in."""
        if self._keep and isinstance(stored := self._codes_type(weight), TensorType):
            assert isinstance(stored.dtype, QuantType)
            return stored.dtype, True
        form = most_exact(self._forms[value] for value in self._sources[weight])
        return None if form == weight.type.dtype else form, False

    def _codes_type(self, value: Value) -> TensorType | str:
        """The type of ``value`` as codes, from the stored ones; a sentence where that is not possible."""
        if value not in self._types:
            self._types[value] = self._find_codes(value)
        return self._types[value]

    def _find_codes(self, value: Value) -> TensorType | str:
        node = self._graph.producers.get(value.name) if value.kind == "node" else None
        if node is None:
            return f"{value} is stored as {value.type.dtype}"
        if node.op.name == "dequantize":
            return node.inputs[0].type
        if node.op.name not in ON_CODES:
            return f"%{node.name} = {node.op.name} cannot be done on codes"
        types = [self._codes_type(item) for item in node.inputs]
        for found in types:
            if isinstance(found, str):
                return found
        try:
            return node.op.output_types(*(t for t in types if isinstance(t, TensorType)))[node.outputs.index(value)]
        except GraphError as error:
            return str(error)

    def _joins(self, parts: Sequence[Value]) -> bool:
        """Whether the codes of these parts can be concatenated."""
        types = [found for part in parts if isinstance(found := self._codes_type(part), TensorType)]
        try:
            _op("concat", axis=0).output_types(*types)
        except GraphError:
            return False
        return True

    def _stored(self, run: _Run, weight: Value, near: Node) -> Value:
        """The value of a run, quantised as it says; it is called after ``weight``."""
        if run.kept:
            codes = [self._codes(part, near) for part in run.parts]
            return codes[0] if len(codes) == 1 else self._insert(_op("concat", axis=0), codes, weight, near)
        plain = run.parts[0] if len(run.parts) == 1 else self._insert(_op("concat", axis=0), run.parts, weight, near)
        if run.form is None:
            return plain
        if plain not in self._quantised:
            if isinstance(run.form, DType):
                op, suffix = _op("cast", dtype=run.form.long_name), run.form.name
            else:
                op, suffix = _op("quantize", form=str(run.form)), "quantised"
            self._quantised[plain] = self._insert(op, [plain], weight, near, suffix)
        return self._quantised[plain]

    def _codes(self, value: Value, near: Node) -> Value:
        """``value`` as codes: the ops that make it, done on the stored codes."""
        node = self._graph.producers[value.name]
        if node.op.name == "dequantize":
            return node.inputs[0]
        if value not in self._codes_of:
            inputs = [self._codes(item, near) for item in node.inputs]
            names = [f"{output.name}.codes" for output in node.outputs]
            made = self.rewriter.insert_all(node.op, inputs, names=names, before=near, replaces=[node])
            self._codes_of.update(zip(node.outputs, made, strict=True))
        return self._codes_of[value]

    def _insert(self, op: Op, inputs: Sequence[Value], weight: Value, near: Node, suffix: str = "part") -> Value:
        return self.rewriter.insert(op, inputs, name=f"{weight.name}.{suffix}", before=near, replaces=[near])

    def _apart(self, node: Node, runs: Sequence[_Run]) -> None:
        """One linear for each run of rows, and their results side by side."""
        weight, results = node.inputs[1], []
        sizes = tuple(sum(part.type.static_shape()[0] for part in run.parts) for run in runs)
        biases: tuple[Value, ...] = ()
        if len(node.inputs) > 2:
            names = [f"{node.inputs[2].name}.part"] * len(runs)
            split = _op("split", sizes=sizes, axis=0)
            biases = self.rewriter.insert_all(split, [node.inputs[2]], names=names, before=node, replaces=[node])
        for position, run in enumerate(runs):
            operands = [node.inputs[0], self._stored(run, weight, node), *biases[position : position + 1]]
            results.append(self.rewriter.insert(node.op, operands, name=f"{node.name}.part", before=node, replaces=[node]))
            self._note(node, weight, run)
        joined = self.rewriter.insert(_op("concat", axis=-1), results, name=f"{node.name}.joined", before=node, replaces=[node])
        self.rewriter.replace(node.outputs[0], joined)
        self.rewriter.remove(node)
        self.changed = True

    def _note(self, node: Node, weight: Value, run: _Run) -> None:
        """Say what became of a weight, and why what is stored quantised did not stay so."""
        rows = ", ".join(part.name for part in run.parts[:3]) + (", …" if len(run.parts) > 3 else "")
        done = "stays plain" if run.form is None else f"is kept as {run.form}" if run.kept else f"becomes {run.form}"
        stored = any(isinstance(source.type.dtype, QuantType) for part in run.parts for source in self._sources[part])
        why = (
            f"; its stored codes are dequantised: {self._codes_type(run.parts[0])}"
            if self._keep and stored and not run.kept
            else ""
        )
        kind: Literal["hit", "refused"] = "refused" if run.form is None else "hit"
        self._ctx.events.append(Event(kind, "quantise", self._graph.name, node.name, f"{rows} {done}{why}"))


def _op(name: str, **attributes: object) -> Op:
    return ops.get(name)(**attributes)
