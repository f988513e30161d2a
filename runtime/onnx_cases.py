"""Numbers on which an exported part is verified, and what its graph makes of them, by the ops' definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from deltaloom.backends.onnx.flat import Flat, Weight
from deltaloom.graph.dims import Dim
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, bf16
from deltaloom.ops.quantized import Quantize
from deltaloom.runtime.executor import positions
from deltaloom.runtime.onnx_source import Source

ANY_INDEX = 1000
"""Integers that are no index into a parameter are drawn below it."""


@dataclass(frozen=True)
class Recorded:
    """One run of a part: its inputs, its states before, its outputs and its new states, in their order."""

    inputs: tuple[Array, ...]
    states: tuple[Array, ...]
    outputs: tuple[Array, ...]
    new_states: tuple[Array, ...]


@dataclass(frozen=True)
class Subject:
    """A part of a whole graph, whose inputs come from running what is before it. ``params``: arrays of all parameters for this."""

    part: Flat
    whole: Flat
    params: Mapping[str, Array | QuantizedArray]
    _known: dict[tuple[int, int, int], Recorded] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def graph(self) -> Graph:
        """What has to run for the part's inputs and outputs."""
        return needed(self.part, self.whole)

    def tokens(self, batch: int, count: int) -> dict[str, Array]:
        """Drawn inputs of so many tokens, all but masks and positions, by name."""
        rng = np.random.default_rng(0)
        made = {}
        for value in self.graph.inputs:
            dtype = value.type.plain_dtype
            shape = value.type.substitute({"batch": batch, "seq": count, "past": 0}).static_shape()
            if dtype.kind == "int" and not _is_positions(value):
                made[value.name] = rng.integers(0, _below(self.graph, value), shape).astype(dtype.numpy)
            elif dtype.kind == "float":
                made[value.name] = rng.standard_normal(shape).astype(dtype.numpy)
        return made

    def run(self, tokens: Mapping[str, Array], states: Mapping[str, Array], valid: Array) -> tuple[Recorded, dict[str, Array]]:
        """Run ``tokens`` after ``states``; ``valid`` [batch, past + seq]. Gives what the part saw and made, and all new states."""
        values: dict[str, Any] = {}
        count = self._count(tokens, valid.shape[1])
        for value in self.graph.inputs:
            if value.type.plain_dtype.kind == "bool":
                values[value.name] = valid
            elif _is_positions(value):
                places = positions(valid, len(valid), valid.shape[1] - count, count)
                values[value.name] = places.astype(value.type.plain_dtype.numpy)
            else:
                values[value.name] = tokens[value.name]
        results = interpret(self.graph, dict(values), self.params.__getitem__, states, observe=values.__setitem__)
        own, new = self.part.graph, {**states, **results.states}
        recorded = Recorded(
            tuple(np.asarray(values[value.name]) for value in own.inputs),
            tuple(states[state.name] for state in own.states),
            tuple(np.asarray(values[value.name]) for _, value in own.outputs),
            tuple(new[state.name] for state in own.states),
        )
        return recorded, new

    def recorded(self, batch: int, past: int, count: int) -> Recorded:
        """The run of ``count`` drawn tokens after ``past`` others, without padding; made once."""
        if (batch, past, count) not in self._known:
            tokens, shapes = self.tokens(batch, past + count), {value.name: value.type.shape for value in self.graph.inputs}
            states, valid = self.empty(batch), np.ones((batch, past + count), bool)
            if past:
                first = {name: along(array, shapes[name], 0, past) for name, array in tokens.items()}
                _, states = self.run(first, states, valid[:, :past])
            rest = {name: along(array, shapes[name], past, past + count) for name, array in tokens.items()}
            self._known[batch, past, count] = self.run(rest, states, valid)[0]
        return self._known[batch, past, count]

    def empty(self, batch: int) -> dict[str, Array]:
        """All states before the first token."""
        types = {state.name: state.value.type for state in self.graph.states}
        sizes = {"batch": batch, "seq": 1, "past": 0}
        return {name: np.zeros(type_.substitute(sizes).static_shape(), type_.plain_dtype.numpy) for name, type_ in types.items()}

    def _count(self, tokens: Mapping[str, Array], otherwise: int) -> int:
        """How many tokens there are."""
        for value in self.graph.inputs:
            for axis, dim in enumerate(value.type.shape):
                if value.name in tokens and str(dim) == "seq":
                    return int(tokens[value.name].shape[axis])
        return otherwise


def subject_of(part: Flat, whole: Flat, source: Source, *, rounded: bool = False) -> Subject:
    """The part with the checkpoint's weights, or with drawn ones where there is none. ``rounded``: those that are only moved are
    rounded to bfloat16, as the model keeps them. The weights of all that is before the part are in memory."""
    rng = np.random.default_rng(1)
    weights = {value.name: whole.weights[value.name] for value in needed(part, whole).params}
    params = {name: _array(weight, source, rng, rounded=rounded) for name, weight in sorted(weights.items())}
    return Subject(part, whole, params)


def needed(part: Flat, whole: Flat) -> Graph:
    """The nodes of ``whole`` on which the part's inputs, outputs and states depend."""
    graph = whole.graph
    ends = (*part.graph.inputs, *(value for _, value in (*part.graph.outputs, *part.graph.updates)))
    wanted = {value.name for value in ends}
    updates = {name: value.name for name, value in graph.updates}
    before = -1
    while len(wanted) != before:
        before = len(wanted)
        for node in reversed(graph.nodes):
            if any(value.name in wanted for value in node.outputs):
                wanted |= {value.name for value in node.inputs}
        wanted |= {updates[state.name] for state in graph.states if state.value.name in wanted and state.name in updates}
    states = tuple(state for state in graph.states if state.value.name in wanted)
    held = {state.name for state in states}
    return replace(
        graph, states=states, outputs=(), updates=tuple((name, value) for name, value in graph.updates if name in held),
        nodes=tuple(node for node in graph.nodes if any(value.name in wanted for value in node.outputs)),
        params=tuple(value for value in graph.params if value.name in wanted),
        inputs=tuple(value for value in graph.inputs if value.name in wanted),
    )  # fmt: skip


def axis_of(shape: Sequence[Dim], name: str) -> int | None:
    """The axis that has this symbolic size."""
    return next((axis for axis, dim in enumerate(shape) if str(dim) == name), None)


def along(array: Array, shape: Sequence[Dim], start: int, stop: int) -> Array:
    """Some tokens of an input: of those that count the past too, all up to the last."""
    axis, whole = axis_of(shape, "seq"), axis_of(shape, "past + seq")
    if axis is not None:
        return np.take(array, range(start, stop), axis=axis)
    return array if whole is None else np.take(array, range(stop), axis=whole)


def _array(weight: Weight, source: Source, rng: np.random.Generator, *, rounded: bool) -> Array | QuantizedArray:
    type_ = weight.value.type
    shape, form = type_.static_shape(), type_.dtype
    if source.weights is None:
        drawn: Array = (rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4.0)).astype(type_.plain_dtype.numpy)
        return Quantize(str(form)).reference(drawn) if isinstance(form, QuantType) else drawn
    if isinstance(form, QuantType):
        parts = ((0, form.stored, form.data_shape(shape)), (1, form.scale, form.scale_shape(shape)))
        codes, scale = (_joined(source.weights.arrays(weight, part, dtype), whole) for part, dtype, whole in parts)
        return QuantizedArray(codes, scale, form, shape)
    dtype = type_.plain_dtype
    if rounded and dtype.kind == "float" and source.weights.moved(weight):
        return _joined(source.weights.arrays(weight, 0, bf16), shape).astype(dtype.numpy)
    return _joined(source.weights.arrays(weight, 0, dtype), shape)


def _joined(pieces: Iterable[Array], shape: Sequence[int]) -> Array:
    return np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(tuple(shape))


def _is_positions(value: Value) -> bool:
    return value.name == "positions"


def _below(graph: Graph, value: Value) -> int:
    """How many rows the parameters have that the readers of an index read."""
    readers = [node for node in graph.nodes if value in node.inputs]
    params = [other for node in readers for other in node.inputs if other.kind == "param"]
    return min((param.type.static_shape()[0] for param in params), default=ANY_INDEX)
