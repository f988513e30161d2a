"""The proof of rewrite rules: each one's pattern is evaluated on its examples, before and after the rewrite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.interpret import interpret, type_of
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array, Attribute, Draw, Op
from deltaloom.graph.types import f64
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.pattern import bound
from deltaloom.passes.rewrite.pattern import given as without_absent
from deltaloom.passes.rewrite.rule import Example, Rule
from deltaloom.testing.evaluate import Value, as_tuple, concrete, in_float64
from deltaloom.testing.kernels import DTYPES_UNDER_TEST
from deltaloom.testing.measure import assert_close


def check_rule(rule: Rule, draw: Draw) -> None:
    """``AssertionError`` unless ``rule`` fires on an example of its own and keeps the meaning of it."""
    example = rule.examples(draw)
    arrays = concrete(example, draw.choice(*DTYPES_UNDER_TEST))
    before = pattern_graph(rule, example, arrays)
    after, events = apply_rules(before, [rule])
    hits = [event for event in events if event.kind == "hit"]
    assert len(hits) == 1, f"rule {rule.name} fires {len(hits)} times on its example: {'; '.join(map(str, events))}\n{before}"
    exact = in_float64(arrays)
    truth = _run(pattern_graph(rule, example, exact), exact)
    rounded, results = _run(before, arrays), _run(after, arrays)
    for name, result in results.items():
        assert_close(f"output {name} after rule {rule.name}", result, truth[name], rounded[name])


def check_interior_use(rule: Rule, draw: Draw) -> None:
    """``AssertionError`` if ``rule`` fires although a value that only the pattern knows leaves the graph."""
    example = rule.examples(draw)
    graph = pattern_graph(rule, example, in_float64(concrete(example, f64)))
    inner = [value for node in graph.nodes for value in node.outputs if value not in graph.results]
    if not inner:
        return
    value = draw.choice(*inner)
    _, events = apply_rules(replace(graph, outputs=(*graph.outputs, ("inner", value))), [rule])
    kinds = {event.kind for event in events}
    found = "; ".join(map(str, events))
    assert "hit" not in kinds and "refused" in kinds, f"{value} is used outside, but rule {rule.name} does not refuse: {found}"


def pattern_graph(rule: Rule, example: Example, arrays: tuple[Value, ...]) -> Graph:
    """The pattern of ``rule`` as a graph over inputs with the types of ``arrays``; the example's attributes stand for ``Any``."""
    builder = _Instance(rule.name, example.attributes)
    values = [builder.input(f"in{position}", type_of(array)) for position, array in enumerate(arrays)]
    for position, value in enumerate(as_tuple(rule.pattern(builder, *values))):
        builder.output(str(position), value)
    return builder.build()


class _Instance(GraphBuilder):
    """A builder that takes what patterns give: ``Any`` among attributes, None for absent inputs."""

    def __init__(self, name: str, attributes: Mapping[str, Attribute]) -> None:
        super().__init__(name)
        self._attributes = attributes

    def _method(self, op: type[Op]) -> Callable[..., Any]:
        method = super()._method(op)

        def add(*inputs: Any, **attributes: Any) -> Any:
            chosen: dict[str, Any] = {key: bound(value, self._attributes) for key, value in attributes.items()}
            return method(*without_absent(inputs), **chosen)

        return add


def _run(graph: Graph, arrays: tuple[Value, ...]) -> dict[str, Array]:
    given_arrays: Any = {value.name: array for value, array in zip(graph.inputs, arrays, strict=True)}
    return interpret(graph, given_arrays, lambda name: None, {}).outputs
