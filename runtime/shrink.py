"""From what was found in a model to the least that shows it: one node, or the nodes of one rewrite, at the smallest sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from deltaloom.graph.dims import Expr
from deltaloom.graph.errors import CompileError, DeltaloomError
from deltaloom.graph.interpret import interpret, type_of
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import TensorType
from deltaloom.passes.pipeline import Fuel
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.rule import rules
from deltaloom.runtime.bisect import Culprit, Question
from deltaloom.runtime.locate import Cause
from deltaloom.runtime.node_check import HostValue
from deltaloom.runtime.repro import Repro
from deltaloom.runtime.sides import Weights, step_inputs
from deltaloom.runtime.weights import TensorSource

Values = Mapping[str, HostValue]


def repro_of_cause(cause: Cause, *, device: str, threads: int | None) -> Repro:
    """The kernel that ``compare`` blames, alone. ``CompileError`` where the cause is no kernel, or shows in the model only."""
    if cause.call is None:
        raise CompileError(f"a repro holds one kernel or one rewrite; this is neither: {cause.sentence}")
    node, call = cause.call.node, cause.call
    backend = call.kernel.partition(".")[0]

    def alone(values: Values) -> Repro:
        return Repro("kernel", _one_node(node, values), values, cause.sentence, backend, device, threads, call.kernel)

    values = {value.name: array for value, array in zip(node.inputs, call.inputs, strict=True)}
    return _smallest(alone, values, {value.name: value.type for value in node.inputs}, f"the kernel {call.kernel}")


def repro_of_culprit(culprit: Culprit, source: TensorSource) -> Repro:
    """The rewrite that ``bisect`` blames, on the nodes that it replaces. ``CompileError`` for a pass without rules."""
    before, question = culprit.before, culprit.question
    if not culprit.rule or before is None or question is None:
        raise CompileError(f"a repro holds one kernel or one rewrite; this is neither: {culprit}")
    body = before if before.name == culprit.body else before.region(culprit.body)
    changed, _ = apply_rules(body, [rules.get(culprit.rule)()], Fuel(1))
    cut = _cut(body, [node for node in body.nodes if changed.producers.get(node.name) != node])
    values = _values_of(before, body, source, question)
    given = {value.name: values(value) for value in (*cut.inputs, *cut.params)}

    def alone(found: Values) -> Repro:
        return Repro("rewrite", cut, found, str(culprit), rule=culprit.rule)

    return _smallest(alone, given, {value.name: value.type for value in cut.inputs}, f"rule {culprit.rule}")


def _one_node(node: Node, values: Values) -> Graph:
    """``node`` as a graph, its types as those of ``values``."""
    given = {
        value: Value(value.name, type_of(values[value.name]), "param" if value.kind == "param" else "input")
        for value in node.inputs
    }
    inputs = tuple(given[value] for value in node.inputs)
    types = node.op.output_types(*(value.type for value in inputs))
    outputs = tuple(replace(value, type=type_, sharding="") for value, type_ in zip(node.outputs, types, strict=True))
    unique = tuple(dict.fromkeys(given.values()))
    return Graph(
        "repro",
        tuple(value for value in unique if value.kind == "input"),
        tuple(value for value in unique if value.kind == "param"),
        nodes=(Node(node.op, inputs, outputs, node.scope, node.source),),
        outputs=tuple((value.name, value) for value in outputs),
    )


def _cut(body: Graph, nodes: list[Node]) -> Graph:
    """Some nodes of a body as a graph of their own; a state becomes an input."""
    inside = {value for node in nodes for value in node.outputs}
    outer = dict.fromkeys(value for node in nodes for value in node.inputs if value not in inside)
    plain = {value: replace(value, kind="input") if value.kind != "param" else value for value in outer}
    used = {value for node in body.nodes if node not in nodes for value in node.inputs} | set(body.results)
    moved = tuple(replace(node, inputs=tuple(plain.get(value, value) for value in node.inputs)) for node in nodes)
    return Graph(
        body.name,
        tuple(value for value in plain.values() if value.kind == "input"),
        tuple(value for value in plain.values() if value.kind == "param"),
        nodes=moved,
        outputs=tuple((value.name, value) for node in nodes for value in node.outputs if value in used),
    )


def _values_of(graph: Graph, body: Graph, source: TensorSource, question: Question) -> Callable[[Value], Any]:
    """What values of ``body`` are when ``graph`` answers ``question``: where it is called first."""
    seen: dict[str, Any] = dict(step_inputs(graph, question.ids, question.past))
    params = Weights(graph, source)
    interpret(graph, dict(seen), params, question.states, observe=seen.__setitem__)
    call = next((node for node in graph.nodes if isinstance(node.op, Call) and node.op.region == body.name), None)
    prefix = call.op.prefix if call is not None and isinstance(call.op, Call) else ""
    arguments = dict(zip(body.inputs, call.inputs, strict=True)) if call is not None else {}

    def found(value: Value) -> Any:
        if value.kind == "param":
            return params(prefix + value.name)
        if prefix + value.name in question.states:
            return question.states[prefix + value.name]
        outer = next((given for own, given in arguments.items() if own.name == value.name), None)
        return seen[outer.name if outer is not None else prefix + value.name]

    return found


def _smallest(alone: Callable[[Values], Repro], values: Values, types: Mapping[str, TensorType], what: str) -> Repro:
    """The repro of the fewest rows, tokens and past entries that is still at fault."""

    def wrong(given: Values) -> Repro | None:
        try:
            made = alone(given)
            return made if made.try_again() is not None else None
        except (DeltaloomError, ValueError, IndexError, RuntimeError):
            return None  # these sizes do not fit the op: another cut is tried

    best = wrong(values)
    if best is None:
        raise CompileError(f"{what} is wrong in the model only: alone, with what it got there, it is right; no repro is written")
    again = True
    while again:
        again = False
        for smaller in _cuts(best.values, types):
            if (made := wrong(smaller)) is not None:
                best, again = made, True
                break
    return best


def _cuts(values: Values, types: Mapping[str, TensorType]) -> Iterator[dict[str, HostValue]]:
    """``values`` with one symbol's size smaller: halves first, either end."""
    sizes = _sizes(values, types)
    for symbol, size in sizes.items():
        for wanted in dict.fromkeys((size // 2, size - 1)):
            if not (0 if symbol == "past" else 1) <= wanted < size:
                continue
            for end in (False, True):
                yield {name: _sliced(array, types.get(name), sizes | {symbol: wanted}, end) for name, array in values.items()}


def _sizes(values: Values, types: Mapping[str, TensorType]) -> dict[str, int]:
    """What each symbol stands for, where a dimension is that symbol alone."""
    found: dict[str, int] = {}
    for name, type_ in types.items():
        for dim, size in zip(type_.shape, values[name].shape, strict=True):
            if isinstance(dim, Expr) and str(dim).isidentifier():
                found[str(dim)] = size
    return found


def _sliced(array: HostValue, type_: TensorType | None, sizes: Mapping[str, int], end: bool) -> HostValue:
    """The part of an array that has these sizes, from its beginning or its end."""
    if type_ is None or isinstance(array, QuantizedArray):
        return array
    wanted = type_.substitute(sizes).shape
    parts = [
        slice(have - size, have) if end else slice(0, size)
        for have, size in ((have, size if isinstance(size, int) else have) for have, size in zip(array.shape, wanted, strict=True))
    ]
    part: Array = array[tuple(parts)].copy()
    return part
