"""Weights at load: the weight graph evaluated destination-passing, straight from the memory-mapped files into final buffers.

Views (reshape, split, transpose) of a stored tensor cost nothing, stack and concat write slices of the result, casts happen while
copying. So the peak beyond the final weights is one tensor that an op computes (a dequantised matrix, for example).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from deltaloom.graph.errors import CheckpointError
from deltaloom.graph.interpret import run_node
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType
from deltaloom.models.inventory import SCALE_SUFFIX
from deltaloom.passes.emit import WeightSlot
from deltaloom.passes.kernel import Backend, Tensor

VIEWS = frozenset({"reshape", "split", "transpose", "unflatten", "flatten"})
"""Ops whose reference only looks at its input in another way."""


class TensorSource(Protocol):
    """Where checkpoint tensors come from, by full name; arrays may be read-only views of files."""

    def read(self, name: str) -> Array:
        """The tensor ``name``."""


class WeightStore:
    """Evaluates weights on demand, each (weight, backend, layout) once; shared by all programs of a model."""

    def __init__(self, source: TensorSource, backends: Mapping[str, Backend]) -> None:
        self._source = source
        self._backends = backends
        self._made: dict[tuple[str, str, str, tuple[int, ...], str], Tensor] = {}

    def get(self, owner: str, prefix: str, graph: Graph, slot: WeightSlot) -> Tensor:
        """The tensor of ``slot`` of ``graph``, which carries its weight graph, under ``prefix``; ``owner``: the model graph."""
        assert graph.weights is not None
        value = graph.weights.output(slot.value.name)
        stored = value.kind == "param"
        key = ("" if stored else owner, prefix + value.name, slot.backend, slot.axes, str(value.type.dtype))
        if key not in self._made:
            array = materialise(graph.weights, value, prefix, self._source, slot.axes)
            self._made[key] = self._backends[slot.backend].from_host(array)
        return self._made[key]


def materialise(weights: Graph, value: Value, prefix: str, source: TensorSource, axes: tuple[int, ...]) -> Array:
    """The array of ``value`` with its axes stored in the order ``axes``: a view of the file where that needs no copy."""
    evaluation = _Evaluation(weights, prefix, source)
    dtype, shape = value.type.plain_dtype.numpy, value.type.static_shape()
    found = evaluation.view(value)
    if found is not None:
        found = found.transpose(axes) if axes else found
        if found.dtype == dtype and found.flags.c_contiguous and found.flags.aligned:
            return found
    order = axes or tuple(range(len(shape)))
    stored = np.empty([shape[axis] for axis in order], dtype)
    evaluation.write(value, stored.transpose(np.argsort(order)))
    return stored


class _Evaluation:
    """One walk over a weight graph for one prefix."""

    def __init__(self, weights: Graph, prefix: str, source: TensorSource) -> None:
        self._weights = weights
        self._prefix = prefix
        self._source = source

    def view(self, value: Value) -> Array | None:
        """``value`` as a view of a stored tensor (in the file's dtype), or None where it is computed."""
        if value.kind == "param":
            return None if isinstance(value.type.dtype, QuantType) else self._read(value)
        node = self._weights.producers[value.name]
        if node.op.name not in VIEWS:
            return None
        below = self.view(node.inputs[0])
        return None if below is None else _output(node, value, [below])

    def write(self, value: Value, out: Array) -> None:
        """Evaluate ``value`` into ``out``, which has its shape and dtype (and any strides)."""
        found = self.view(value)
        if found is not None:
            copy_cast(found, out)
            return
        node = self._weights.producers[value.name]
        if node.op.name == "stack":
            for part, item in zip(out, node.inputs, strict=True):
                self.write(item, part)
        elif node.op.name == "concat":
            axis, start = int(node.op.axis), 0  # type: ignore[attr-defined]
            for item in node.inputs:
                size = item.type.static_shape()[axis]
                self.write(item, out[(slice(None),) * (axis % out.ndim) + (slice(start, start + size),)])
                start += size
        else:
            np.copyto(out, _output(node, value, [self._compute(item) for item in node.inputs]), casting="unsafe")

    def _compute(self, value: Value) -> Array | QuantizedArray:
        """``value`` as an array of its own type."""
        if isinstance(value.type.dtype, QuantType):
            if value.kind != "param":
                raise CheckpointError(f"%{value.name} is a computed quantised value; only stored ones can be dequantised at load")
            name, block = self._prefix + value.name, value.type.dtype.block
            return QuantizedArray(self._source.read(name), self._source.read(name + SCALE_SUFFIX), block)
        out = np.empty(value.type.static_shape(), value.type.plain_dtype.numpy)
        self.write(value, out)
        return out

    def _read(self, value: Value) -> Array:
        array = self._source.read(self._prefix + value.name)
        if array.shape != value.type.static_shape():
            wanted = list(value.type.static_shape())
            raise CheckpointError(f"tensor '{self._prefix}{value.name}' has shape {list(array.shape)}, expected {wanted}")
        return array


def copy_cast(source: Array, out: Array) -> None:
    """Copy with a change of dtype. bfloat16 widens to float32 by placing its 16 bits high, several times faster than a cast."""
    if source.dtype.name == "bfloat16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, source.view(np.uint16), casting="unsafe")
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, source, casting="unsafe")


def _output(node: Node, value: Value, arrays: list[Any]) -> Array:
    results = run_node(node, arrays)
    found: Array = results[node.outputs.index(value)]
    return found
