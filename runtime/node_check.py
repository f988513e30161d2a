"""One node at a time: what a kernel made of the values that it got, against its op's definition on the same values in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.distance import FACTOR, FLOOR, distance, ulps
from deltaloom.graph.interpret import dtype_of, run_node, type_of
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.passes.emit import returned_values
from deltaloom.passes.kernel import Appended, Backend, Kernel, kernels_for

HostValue = Array | QuantizedArray


@dataclass(frozen=True)
class Difference:
    """How far two arrays of one value are apart: ``error`` relative to the largest element, in ``ulps`` of the result's dtype, and
    ``largest`` as a number; ``noise``: how far the definition is from itself when it is rounded to that dtype, ``allowed``: the
    error up to which nothing is wrong. ``at`` is the index of the largest error; what cannot be subtracted is infinitely far."""

    error: float
    ulps: float
    largest: float
    noise: float
    allowed: float
    at: tuple[int, ...] = ()

    @property
    def parts(self) -> bool:
        """Whether it is more than rounding."""
        return not self.error <= self.allowed

    def __str__(self) -> str:
        if np.isinf(self.error):
            return f"not to be compared: other shapes, or numbers of which only one is finite, at {list(self.at)}"
        noise = f", the noise of rounding is {self.noise:.2g}" if self.noise else ""
        shown = f"{self.ulps:.3g} ulp, {self.error:.2g} of the largest element, max |Δ| {self.largest:.3g} at {list(self.at)}"
        return f"{shown} (allowed {self.allowed:.2g}{noise})"


def difference(
    result: Array, truth: Array, rounded: Array | None = None, *, truth_exact: Array | None = None, depth: int = 1
) -> Difference:
    """How far ``result`` is from ``truth``. ``rounded`` is the definition in the dtype of the result, ``truth_exact`` the same in
    float64 (``truth`` itself if None); ``depth``: of how many layers it is the result, each of which rounds in places of its own.
    Whole numbers and booleans must be equal."""
    if result.shape != truth.shape:
        return Difference(np.inf, np.inf, np.inf, 0.0, 0.0)
    if not result.size:
        return Difference(0.0, 0.0, 0.0, 0.0, 0.0)
    if result.dtype.kind in "iub":
        wrong = result != truth
        worst = np.abs(result.astype(np.float64) - truth.astype(np.float64))
        place = _index(worst)
        return Difference(float(wrong.mean()), float(worst.max()), float(worst.max()), 0.0, 0.0, place)
    noise = 0.0 if rounded is None else distance(rounded, truth if truth_exact is None else truth_exact)
    floor = FLOOR[min((dtype_of(result), dtype_of(truth)), key=lambda dtype: dtype.itemsize)]
    if not np.isfinite(noise):
        return Difference(0.0, 0.0, 0.0, noise, noise)
    with np.errstate(all="ignore"):
        errors = np.abs(result.astype(np.float64) - truth.astype(np.float64))
    largest = float(np.nanmax(errors, initial=0.0))
    return Difference(distance(result, truth), ulps(result, truth), largest, noise, FACTOR * noise + depth * floor, _index(errors))


def _index(errors: Array) -> tuple[int, ...]:
    """Where the largest error is; a number that is none counts most."""
    place = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
    return tuple(int(i) for i in np.unravel_index(place, errors.shape))


@dataclass(frozen=True)
class NodeCall:
    """A node, what it got as typed (host arrays) and what its ``kernel`` made, in the order of its outputs."""

    node: Node
    inputs: tuple[HostValue, ...]
    outputs: tuple[HostValue, ...]
    kernel: str = ""

    def faults(self) -> dict[str, Difference]:
        """By output, what is farther from the definition than rounding explains. Empty for an op without a definition."""
        if self.node.op.reference is None:
            return {}
        truth, rounded = run_node_quietly(self.node, in_float64(self.inputs)), run_node_quietly(self.node, self.inputs)
        found = {}
        for value, made, exact, own in zip(self.node.outputs, self.outputs, truth, rounded, strict=True):
            if isinstance(made, QuantizedArray) or isinstance(exact, QuantizedArray):
                continue
            wide = exact if made.dtype.kind in "f" or made.dtype.name == "bfloat16" else own
            one = difference(made, wide, own)
            if one.parts:
                found[value.name] = one
        return found


def run_node_quietly(node: Node, arrays: Sequence[HostValue]) -> tuple[Any, ...]:
    """The definition of a node; numbers may overflow in it."""
    with np.errstate(all="ignore"):
        return run_node(node, list(arrays))


def in_float64(arrays: Sequence[HostValue]) -> list[HostValue]:
    """The same numbers, plain floats in float64."""
    return [
        array if isinstance(array, QuantizedArray) or array.dtype.kind in "iub" else array.astype(np.float64) for array in arrays
    ]


def typed_inputs(node: Node, arguments: Sequence[Any], backend: Backend) -> tuple[HostValue, ...]:
    """Copies of what a kernel gets, as the graph types it: weights in their own axis order, append states cut to what is filled."""
    names, layouts = node.op.input_names(), {} if node.placement is None else dict(node.placement.layouts)
    found: list[HostValue] = []
    for position, argument in enumerate(arguments):
        name = names[min(position, len(names) - 1)]
        if isinstance(argument, Appended):
            filled = _filled(backend.to_host(argument.data), node.op.appends[name], int(argument.length))
            found.append(np.array(filled))
            continue
        array = backend.to_host(argument)
        if isinstance(array, QuantizedArray):
            found.append(replace(array, data=np.array(array.data), scale=np.array(array.scale)))
        else:
            found.append(np.array(array.transpose(np.argsort(layouts[position])) if position in layouts else array))
    return tuple(found)


def made_outputs(
    node: Node, arguments: Sequence[Any], returned: Sequence[Any], inputs: Sequence[HostValue], backend: Backend
) -> tuple[HostValue, ...]:
    """Copies of all outputs of a node whose kernel ran: those that it returned, and the append states that it extended."""
    names = node.op.input_names()
    growing = {output: name for name, output in node.op.updates.items() if name in node.op.appends}
    given = dict(zip(returned_values(node), returned, strict=True))
    sizes = _new_entries(node, inputs)
    found: list[HostValue] = []
    for output, value in enumerate(node.outputs):
        if output in growing:
            position, axis = names.index(growing[output]), node.op.appends[growing[output]]
            whole = backend.to_host(arguments[position].data)
            found.append(np.array(_filled(whole, axis, inputs[position].shape[axis] + sizes[output])))
            continue
        array = backend.to_host(given[value])
        found.append(array if isinstance(array, QuantizedArray) else np.array(array))
    return tuple(found)


def _new_entries(node: Node, inputs: Sequence[HostValue]) -> dict[int, int]:
    """By output, how many entries the node adds to an append state."""
    names, found = node.op.input_names(), {}
    if node.op.appends:
        types = node.op.output_types(*(type_of(array) for array in inputs))
        for name, axis in node.op.appends.items():
            output = node.op.updates[name]
            found[output] = types[output].static_shape()[axis] - inputs[names.index(name)].shape[axis]
    return found


def _filled(array: Array, axis: int, count: int) -> Array:
    found: Array = array[(slice(None),) * axis + (slice(0, count),)]
    return found


def call_kernel(kernel: Kernel, node: Node, arrays: Sequence[HostValue], backend: Backend) -> NodeCall:
    """Run one kernel on host arrays, without buffers, and note what it got and made."""
    names, layouts = node.op.input_names(), dict(kernel.layouts(node))
    arguments: list[Any] = []
    sizes = _new_entries(node, arrays)
    for position, array in enumerate(arrays):
        name = names[min(position, len(names) - 1)]
        if isinstance(array, QuantizedArray):
            arguments.append(backend.from_host(array))
        elif name in node.op.appends:
            axis = node.op.appends[name]
            room = list(array.shape)
            room[axis] = sizes[node.op.updates[name]]
            data = np.concatenate([array, np.zeros(room, array.dtype)], axis=axis)
            arguments.append(Appended(backend.from_host(data), backend.length(array.shape[axis])))
        else:
            stored = array.transpose(layouts[position]) if position in layouts else array
            arguments.append(backend.from_host(np.array(stored, order="C")))
    with np.errstate(all="ignore"):
        made = kernel.run(node.op, *arguments)
    returned = made if isinstance(made, tuple) else (made,)
    return NodeCall(node, tuple(arrays), made_outputs(node, arguments, returned, arrays, backend), kernel.name)


def parts_of(node: Node, inputs: Sequence[HostValue]) -> Graph | None:
    """The decomposition of a node for inputs like these, as a graph of its own; None for what has none."""
    if node.op.decompose is None:
        return None
    builder = GraphBuilder(node.name)
    names = node.op.input_names()
    shown = [
        names[position] if position < len(names) - 1 or len(names) >= len(inputs) else f"{names[-1]}{position}"
        for position in range(len(inputs))
    ]
    values = [builder.input(name, type_of(array)) for name, array in zip(shown, inputs, strict=True)]
    made = node.op.decompose(builder, *values)
    if made is None:
        return None
    for value, result in zip(node.outputs, cast(tuple[Value, ...], made if isinstance(made, tuple) else (made,)), strict=True):
        builder.output(value.name, result)
    return builder.build()


def unfold(node: Node, inputs: Sequence[HostValue], backend: Backend) -> tuple[Graph, NodeCall, str] | None:
    """Run the decomposition of a node on kernels of ``backend``: all parts, the first wrong one and its first wrong output; None
    where every part is right, so that the fused kernel itself is wrong."""
    graph = parts_of(node, inputs)
    if graph is None:
        return None
    values: dict[Value, HostValue] = dict(zip(graph.inputs, inputs, strict=True))
    for part in graph.nodes:
        given = [values[value] for value in part.inputs]
        static = replace(part, inputs=tuple(replace(v, type=type_of(a)) for v, a in zip(part.inputs, given, strict=True)))
        kernel = next((one for one in kernels_for(backend, part.op.name) if one.refusal(static) is None), None)
        if kernel is None:
            values |= dict(zip(part.outputs, run_node_quietly(part, given), strict=True))
            continue
        call = call_kernel(kernel, static, given, backend)
        faults = call.faults()
        if faults:
            return graph, call, next(iter(faults))
        values |= dict(zip(part.outputs, call.outputs, strict=True))
    return None
