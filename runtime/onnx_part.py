"""An exported part beside what its graph itself makes of the same numbers: cases of many lengths, in pieces, padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deltaloom.graph.distance import distance
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import f16
from deltaloom.runtime.onnx_cases import Recorded, Subject, along, axis_of

TOKENS, PASTS, BATCHES = (1, 4, 5, 15, 16, 17, 53), (0, 7), (1, 2)
PROMPT, STEPS, PADDING = 16, 7, 9

OP, PART, HALF = 1e-5, 5e-5, 2e-2
"""Limits of an error, relative to the largest result: in float32 of one op, sums in another order; of a part, the error of each op
goes on into the next; in float16, its 10 bits of mantissa."""

Run = Callable[[Mapping[str, Array]], Sequence[Array]]
Given = Sequence[tuple[str, str, Sequence[Any]]]
"""Inputs of a model: name, type and shape as ONNX Runtime says them."""


def limit_of(subject: Subject) -> float:
    """The largest error that is allowed."""
    nodes = subject.part.graph.nodes
    if any(value.type.dtype == f16 for node in nodes for value in node.outputs):
        return HALF
    return OP if len(nodes) == 1 else PART


class PartCheck:
    """One way to run a part, against the definitions of its ops."""

    def __init__(self, subject: Subject, given: Given, run: Run) -> None:
        self._subject, self._given, self._run = subject, given, run

    def errors(self) -> Iterator[tuple[str, float]]:
        """Every case with the largest error of its outputs and new states."""
        graph = self._subject.graph
        batches, tokens = BATCHES if _has(graph, "batch") else (1,), TOKENS if _has(graph, "seq") else (1,)
        for batch in batches:
            for past in PASTS if len(tokens) > 1 else (0,):
                for count in tokens:
                    recorded = self._subject.recorded(batch, past, count)
                    outputs, states = self._call(recorded, recorded.states)
                    error = _largest([*outputs, *states], [*recorded.outputs, *recorded.new_states])
                    yield f"batch {batch}, past {past}, {count} tokens", error
        if len(tokens) > 1:
            yield f"{PROMPT} tokens, then one by one", self._in_pieces()
        if len(batches) > 1 and any(value.type.plain_dtype.kind == "bool" for value in graph.inputs):
            yield "padded on the left", self._padded()

    def _call(self, given: Recorded, states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """The outputs, and the new states without columns that their consumer keeps in front."""
        arrays = [*given.inputs, *states]
        feed = {name: _fitting(kind, shape, array) for (name, kind, shape), array in zip(self._given, arrays)}
        feed.update({name: _weight(name, self._subject) for name, _, _ in self._given[len(arrays) :]})
        made, count = list(self._run(feed)), len(given.outputs)
        news = [array[..., array.shape[-1] - new.shape[-1] :] for array, new in zip(made[count:], given.new_states, strict=True)]
        return made[:count], news

    def _in_pieces(self) -> float:
        whole, graph = self._subject.recorded(1, 0, PROMPT + STEPS), self._subject.part.graph
        states, parts = list(whole.states), list[list[Array]]()
        for start, stop in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]:
            shapes = [value.type.shape for value in graph.inputs]
            inputs = tuple(along(array, shape, start, stop) for array, shape in zip(whole.inputs, shapes, strict=True))
            outputs, states = self._call(Recorded(inputs, (), whole.outputs, whole.new_states), states)
            parts.append(outputs)
        joined = []
        for position, (_, value) in enumerate(graph.outputs):
            axis, found = axis_of(value.type.shape, "seq"), [outputs[position] for outputs in parts]
            joined.append(found[-1] if axis is None else np.concatenate(found, axis=axis))
        return _largest([*joined, *states], [*whole.outputs, *whole.new_states])

    def _padded(self) -> float:
        """The second row begins with padding: what is computed of its tokens is what they give alone."""
        count = PROMPT + 1
        tokens = self._subject.tokens(2, count)
        shapes = {value.name: value.type.shape for value in self._subject.graph.inputs}
        row = {name: along(array, shapes[name], PADDING, count)[1:] for name, array in tokens.items()}
        alone, _ = self._subject.run(row, self._subject.empty(1), np.ones((1, count - PADDING), bool))
        valid = np.ones((2, count), bool)
        valid[1, :PADDING] = False
        given, _ = self._subject.run(tokens, self._subject.empty(2), valid)
        outputs, _ = self._call(given, given.states)
        pairs = [
            (np.take(made[1:], range(PADDING, count), axis=axis), true)
            for (_, value), made, true in zip(self._subject.part.graph.outputs, outputs, alone.outputs, strict=True)
            if (axis := axis_of(value.type.shape, "seq")) is not None and axis_of(value.type.shape, "batch") == 0
        ]
        return _largest([made for made, _ in pairs], [true for _, true in pairs])


def _largest(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    return max((_error(one, true) for one, true in zip(found, wanted, strict=True)), default=0.0)


def _error(found: Array, true: Array) -> float:
    """Relative to the largest element; whole numbers must be equal."""
    if found.shape != true.shape:
        return float("inf")
    if true.dtype.kind in "iub":
        return 0.0 if np.array_equal(found, true) else float("inf")
    return distance(found, true)


def _fitting(kind: str, shape: Sequence[Any], array: Array) -> Array:
    """An input as it is declared: masks as int64, states with the columns that their consumer keeps in front."""
    if array.dtype == bool and kind == "tensor(int64)":
        return array.astype(np.int64)
    if array.ndim and isinstance(shape[-1], int) and shape[-1] > array.shape[-1]:
        array = np.concatenate([np.zeros((*array.shape[:-1], shape[-1] - array.shape[-1]), array.dtype), array], axis=-1)
    return np.ascontiguousarray(array)


def _weight(name: str, subject: Subject) -> Array:
    """A weight that is an input of the model."""
    known = subject.params.get(name)
    plain = known is not None and not isinstance(known, QuantizedArray)
    wrong = f"the model's input '{name}' is a weight in a form that NumPy cannot give; export with its weights to verify it"
    require(plain, wrong, ExportError)
    return np.asarray(known)


def _has(graph: Graph, name: str) -> bool:
    return any(axis_of(value.type.shape, name) is not None for value in graph.inputs)
