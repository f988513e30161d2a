"""Weights at load: the weight graph evaluated destination-passing, straight from the memory-mapped files into final buffers.

Views (reshape, split, transpose) of a stored tensor cost nothing, stack and concat write slices of the result, casts happen while
copying. So the peak beyond the final weights is one tensor that an op computes (a dequantised matrix, for example).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from mmap import mmap
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from deltaloom.graph.errors import CheckpointError, GraphError
from deltaloom.graph.interpret import run_node
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray, copy_cast, empty
from deltaloom.graph.types import QuantType
from deltaloom.passes.emit import WeightSlot
from deltaloom.passes.kernel import Backend, Tensor

VIEWS = frozenset({"reshape", "split", "transpose", "unflatten", "flatten", "shard"})
"""Ops whose reference only looks at its input in another way; a ``shard`` of several runs copies these, in the file's dtype."""


class TensorSource(Protocol):
    """Where checkpoint tensors come from, by full name; arrays may be read-only views of files."""

    def read(self, name: str) -> Array:
        """The tensor ``name``."""


@runtime_checkable
class EvaluatesWeights(Protocol):
    """A backend whose device makes weights of checkpoint tensors itself, where it is not the CPU."""

    def evaluated(self, weights: Graph, value: Value, prefix: str, read: Callable[[str], Array], axes: tuple[int, ...]) -> Tensor:
        """``value`` of a weight graph under ``prefix``, its axes stored in the order ``axes``."""


def streams(backend: Backend) -> bool:
    """Whether weights are made on the backend's device."""
    return backend.device != "cpu" and isinstance(backend, EvaluatesWeights)


class WeightStore:
    """Evaluates weights on demand, each (weight, backend, layout) once; shared by all programs of a model."""

    def __init__(self, source: TensorSource, backends: Mapping[str, Backend]) -> None:
        self._source = source
        self._backends = backends
        self._made: dict[tuple[str, str, str, tuple[int, ...], str], Tensor] = {}
        self.held = self.mapped = 0
        """Bytes of the weights so far: made for these programs, and as they lie in files."""

    def get(self, owner: str, prefix: str, graph: Graph, slot: WeightSlot) -> Tensor:
        """The tensor of ``slot`` of ``graph``, which carries its weight graph, under ``prefix``; ``owner``: the model graph."""
        assert graph.weights is not None
        value = graph.weights.output(slot.value.name)
        stored = value.kind == "param"
        key = ("" if stored else owner, prefix + value.name, slot.backend, slot.axes, str(value.type.dtype))
        if key not in self._made:
            backend = self._backends[slot.backend]
            if streams(backend):
                made = cast(EvaluatesWeights, backend).evaluated(graph.weights, value, prefix, self._source.read, slot.axes)
                self._made[key] = made
                self.held += made.nbytes
                return made
            array = materialise(graph.weights, value, prefix, self._source, slot.axes)
            self._made[key] = backend.from_host(array)
            for part in (array.data, array.scale) if isinstance(array, QuantizedArray) else (array,):
                if backend.device == "cpu" and in_file(part):
                    self.mapped += part.nbytes
                else:
                    self.held += part.nbytes
        return self._made[key]


def materialise(weights: Graph, value: Value, prefix: str, source: TensorSource, axes: tuple[int, ...]) -> Array | QuantizedArray:
    """The array of ``value`` with its axes stored in the order ``axes``: a view of the file where that needs no copy. A quantised
    value is always stored as typed."""
    evaluation = _Evaluation(weights, prefix, source)
    if isinstance(value.type.dtype, QuantType):
        assert not axes
        return evaluation.codes(value)
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
        if narrows(node):
            stored = self.view(node.inputs[0])
            return stored if stored is not None and stored.dtype == value.type.plain_dtype.numpy else None
        if node.op.name not in VIEWS:
            return None
        below = self.view(node.inputs[0])
        return None if below is None else _output(node, value, [below])

    def codes(self, value: Value) -> QuantizedArray:
        """A quantised ``value``: stored codes as views of the file where that needs no copy."""
        if (stored := self._stored_codes(value)) is not None:
            return stored
        out = empty(value.type)
        self._write_codes(value, out)
        return out

    def _stored_codes(self, value: Value) -> QuantizedArray | None:
        """Stored codes, or a part of them; None where they are computed or joined."""
        form = value.type.dtype
        if value.kind == "param":
            assert isinstance(form, QuantType)
            name, shape = self._prefix + value.name, value.type.static_shape()
            return QuantizedArray(self._source.read(name), self._source.read(name + SCALE_SUFFIX), form, shape)
        node = self._weights.producers[value.name]
        if node.op.name not in VIEWS:
            return None
        below = self._stored_codes(node.inputs[0])
        found: QuantizedArray | None = None if below is None else run_node(node, [below])[node.outputs.index(value)]
        return found

    def _write_codes(self, value: Value, out: QuantizedArray) -> None:
        """Evaluate a quantised ``value`` into ``out``."""
        if (stored := self._stored_codes(value)) is not None:
            _copy_codes(stored, out)
            return
        node = self._weights.producers[value.name]
        if node.op.name == "quantize":
            self._quantise(node, node.inputs[0], out)
        elif pieces := self._pieces(node, out):
            for item, part in pieces:
                self._write_codes(item, part)
        else:
            below = [self.codes(item) for item in node.inputs]
            _copy_codes(run_node(node, below)[node.outputs.index(value)], out)

    def _quantise(self, node: Node, plain: Value, out: QuantizedArray) -> None:
        """Write ``plain`` quantised into ``out``, piece by piece where it is joined of pieces: what an expert or a sibling makes of
        its own rows does not depend on the others, and only one of them exists in full at a time."""
        made = self._weights.producers.get(plain.name) if plain.kind == "node" else None
        pieces = self._pieces(made, out) if made is not None and self.view(plain) is None else None
        if pieces:
            for item, part in pieces:
                self._quantise(node, item, part)
            return
        try:
            (codes,) = run_node(node, [self._compute(plain)])
        except GraphError as error:
            raise CheckpointError(f"the weight '{self._prefix}{plain.name}' cannot be quantised: {error}") from error
        _copy_codes(codes, out)

    @staticmethod
    def _pieces(node: Node, out: QuantizedArray) -> list[tuple[Value, QuantizedArray]] | None:
        """The inputs of a stack or concat with the part of ``out`` that each fills; None where a part would end in a block."""
        if node.op.name == "stack":
            return [(item, out[index]) for index, item in enumerate(node.inputs)]
        if node.op.name != "concat":
            return None
        axis = int(node.op.axis) % len(out.shape)  # type: ignore[attr-defined]
        sizes = [item.type.static_shape()[axis] for item in node.inputs]
        borders = list(accumulate(sizes))[:-1]
        if not all(out.form.cuts(axis - len(out.shape), border) for border in borders):
            return None
        return list(zip(node.inputs, out.split(sizes, axis), strict=True))

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
        elif narrows(node) and self._moved(node.inputs[0]):
            self.write(node.inputs[0], out)
        elif node.op.name == "concat":
            axis, start = int(node.op.axis), 0  # type: ignore[attr-defined]
            for item in node.inputs:
                size = item.type.static_shape()[axis]
                self.write(item, out[(slice(None),) * (axis % out.ndim) + (slice(start, start + size),)])
                start += size
        else:
            np.copyto(out, _output(node, value, [self._compute(item) for item in node.inputs]), casting="unsafe")

    def _moved(self, value: Value) -> bool:
        """Whether ``value`` is stored tensors side by side, so that a cast of it can be done where they are copied, in one step."""
        if self.view(value) is not None:
            return True
        node = self._weights.producers[value.name]
        return node.op.name in ("stack", "concat") and all(map(self._moved, node.inputs))

    def _compute(self, value: Value) -> Array | QuantizedArray:
        """``value`` as an array of its own type."""
        if isinstance(value.type.dtype, QuantType):
            return self.codes(value)
        out = np.empty(value.type.static_shape(), value.type.plain_dtype.numpy)
        self.write(value, out)
        return out

    def _read(self, value: Value) -> Array:
        array = self._source.read(self._prefix + value.name)
        if array.shape != value.type.static_shape():
            wanted = list(value.type.static_shape())
            raise CheckpointError(f"tensor '{self._prefix}{value.name}' has shape {list(array.shape)}, expected {wanted}")
        return array


def _copy_codes(source: QuantizedArray, out: QuantizedArray) -> None:
    np.copyto(out.data, source.data)
    np.copyto(out.scale, source.scale)


def in_file(array: Array) -> bool:
    """Whether an array is a view of a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap)


def narrows(node: Node) -> bool:
    """Whether a node casts to a narrower dtype, which may as well be done to the stored numbers."""
    return node.op.name == "cast" and node.outputs[0].type.plain_dtype.itemsize < node.inputs[0].type.plain_dtype.itemsize


def _output(node: Node, value: Value, arrays: list[Any]) -> Array:
    results = run_node(node, arrays)
    found: Array = results[node.outputs.index(value)]
    return found
