"""The weights that kernels get, against the checkpoint: in the right places, and no farther off than their form explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from deltaloom.graph.distance import FLOOR
from deltaloom.graph.interpret import run_node
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray
from deltaloom.graph.types import DType, QuantType, bf16, f8_e4m3, f16, f32, f64
from deltaloom.ops.quantized import HIGHEST, Dequantize
from deltaloom.passes.driver import Variant
from deltaloom.runtime.model import Model
from deltaloom.runtime.node_check import Difference, difference
from deltaloom.runtime.sides import LAST, shown_name
from deltaloom.runtime.weights import TensorSource

ROUNDED: dict[DType, float] = {f64: FLOOR[f64], f32: 2.0**-22, f16: 2.0**-10, bf16: 2.0**-7}
"""How far plain weights may be from the checkpoint's, relative to the largest: one rounding, or two."""
SLACK = 2.0**-7
"""Scales are rounded too, to bfloat16 at least."""


class PlainWeights:
    """What a weight graph would give if it neither quantised nor rounded, in float64."""

    def __init__(self, graph: Graph, prefix: str, source: TensorSource) -> None:
        self._graph = graph
        self._prefix = prefix
        self._source = source
        self._known: dict[Value, Array] = {}

    def __call__(self, value: Value) -> Array:
        """One value of the graph."""
        if value not in self._known:
            if value.kind == "param":
                self._known[value] = self._stored(value)
            else:
                node = self._graph.producers[value.name]
                self._known |= zip(node.outputs, self._made(node), strict=True)
        return self._known[value]

    def _stored(self, value: Value) -> Array:
        name, form = self._prefix + value.name, value.type.dtype
        stored = self._source.read(name)
        if isinstance(form, QuantType):
            return plain(QuantizedArray(stored, self._source.read(name + SCALE_SUFFIX), form, value.type.static_shape()))
        return np.asarray(stored).astype(np.float64)

    def _made(self, node: Node) -> tuple[Any, ...]:
        arrays = [self(value) for value in node.inputs]
        if node.op.name in ("quantize", "dequantize", "cast"):
            return (arrays[0],)
        return run_node(node, arrays)


def plain(array: Array | QuantizedArray) -> Array:
    """The numbers that a weight stands for, in float64."""
    if isinstance(array, QuantizedArray):
        found: Array = Dequantize("float64").reference(array)
        return found
    return array.astype(np.float64)


def weight_faults(
    model: Model, source: TensorSource, *, only: str | None = None
) -> Iterator[tuple[str, Node | None, str, Difference]]:
    """Weights that are not what the checkpoint says: full name, the last node that makes it, its type, and how far it is off.
    ``only``: of one prefix."""
    seen = set()
    for decode in (False, True):
        program, tensors = model.main.bound(Variant(decode, False, (LAST,)))
        for instance in program.graph.instances():
            if instance.graph.weights is None or (only is not None and instance.prefix != only):
                continue
            truth = PlainWeights(instance.graph.weights, instance.prefix, source)
            slots = program.signatures[program.function(instance.graph)].weights
            for slot, tensor in zip(slots, tensors[instance.prefix], strict=True):
                if (instance.prefix, slot) in seen:
                    continue
                seen.add((instance.prefix, slot))
                value = instance.graph.weights.output(slot.value.name)
                host = model.ctx.backend(slot.backend).to_host(tensor)
                if slot.axes:
                    host = host.transpose(np.argsort(slot.axes))
                found = _difference(host, truth(value), stored=not _quantised_here(instance.graph.weights, value))
                if found.parts:
                    node = instance.graph.weights.producers.get(value.name)
                    yield shown_name(instance.prefix, slot.value), node, str(slot.value.type), found


def _quantised_here(graph: Graph, value: Value) -> bool:
    """Whether a weight is quantised by its weight graph, not already in the file."""
    node = graph.producers.get(value.name)
    return node is not None and (node.op.name == "quantize" or any(_quantised_here(graph, one) for one in node.inputs))


def _difference(found: Array | QuantizedArray, truth: Array, *, stored: bool) -> Difference:
    """How far a weight is off. The error of integer codes is relative to their row."""
    if not isinstance(found, QuantizedArray):
        dtype = next(dtype for dtype in ROUNDED if dtype.numpy == found.dtype)
        one = difference(found, truth)
        return _allowing(one, ROUNDED[dtype])
    numbers = plain(found)
    if stored:
        return _allowing(difference(numbers, truth), ROUNDED[f32])
    if found.form.storage == f8_e4m3:
        return _allowing(difference(numbers, truth), 2.0**-4 + SLACK)
    if numbers.shape == truth.shape:
        size = np.abs(truth).max(axis=-1, keepdims=True)
        size[size == 0] = 1
        numbers, truth = numbers / size, truth / size
    return _allowing(difference(numbers, truth), 0.5 / HIGHEST[found.form.storage] + SLACK)


def _allowing(found: Difference, allowed: float) -> Difference:
    return Difference(found.error, found.ulps, found.largest, 0.0, allowed, found.at)
