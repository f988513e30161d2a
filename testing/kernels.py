"""Kernels of backends, run on generated cases as a compiled program would run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltaloom.graph.errors import CompileError
from deltaloom.graph.interpret import type_of
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, TensorType, bf16, f32, f64
from deltaloom.passes.kernel import Appended, Backend, Kernel
from deltaloom.passes.memory import returned as returned_by
from deltaloom.testing.evaluate import Value, as_tuple, one_node

DTYPES_UNDER_TEST = (f32, f64, bf16)
"""The float dtypes that the kit draws from."""
ROOM = 3
"""Entries of an append state's buffer behind those that a case needs; they hold ``RUBBISH``."""
RUBBISH = 50.0


def dtypes_of(backend: Backend) -> tuple[DType, ...]:
    """The dtypes of the kit that the backend computes in."""
    found = []
    for dtype in DTYPES_UNDER_TEST:
        try:
            found.append(backend.compute_dtype(dtype.long_name))
        except CompileError:
            continue
    return tuple(dict.fromkeys(found))


def accepted_node(kernel: Kernel, op: Op, arrays: tuple[Value, ...]) -> Node | None:
    """The node of a case, if the kernel accepts it, with inputs that are computed or else with parameters."""
    types = tuple(map(type_of, arrays))
    for params in (False, True):
        node = one_node(op, types, params=params).nodes[0]
        wants_params = any(node.inputs[position].kind != "param" for position, _ in kernel.layouts(node))
        if not wants_params and kernel.refusal(node) is None:
            return node
    return None


def takes_buffers(kernel: Kernel) -> bool:
    """Whether a memory plan may give the kernel buffers."""
    return kernel.into or kernel.scratch is not None


def run_kernel(
    backend: Backend, kernel: Kernel, node: Node, arrays: tuple[Value, ...], *, buffers: bool = False
) -> tuple[Array, ...]:
    """All outputs of ``node`` by ``kernel``, append states included; with ``buffers`` it is given buffers for its outputs and for
    scratch, full of poison. ``AssertionError`` if the kernel writes to an input that is not a state, or to the filled part of an
    append state, if it returns an output elsewhere than in its buffer, or a new state that lies in anything but the old one."""
    op = node.op
    names, layouts = op.input_names(), dict(kernel.layouts(node))
    tensors: list[Any] = []
    for position, array in enumerate(arrays):
        name = names[position] if position < len(names) else names[-1]
        if isinstance(array, QuantizedArray):
            tensors.append(backend.from_host(array))
        elif name in op.appends:
            tensors.append(_buffer(backend, array, op.appends[name], _entries(node, name)))
        else:
            stored = array.transpose(layouts[position]) if position in layouts else array
            tensors.append(backend.from_host(np.ascontiguousarray(stored).copy()))
    out = [_poisoned(backend, value.type) for value in returned_by(node)] if buffers and kernel.into else []
    scratch = [_poisoned(backend, t) for t in kernel.scratch(_roomier(node))] if buffers and kernel.scratch is not None else []
    given: dict[str, Any] = {"out": out[0] if len(out) == 1 else tuple(out)} if out else {}
    given |= {"scratch": tuple(scratch)} if scratch else {}
    with np.errstate(all="ignore"):
        made = as_tuple(kernel.run(op, *tensors, **given))
    returned = iter(made)
    _check_unchanged(backend, node, arrays, tensors, layouts)
    _check_places(backend, kernel, node, made, [*tensors, *out, *scratch], out)
    growing = {output: name for name, output in op.updates.items() if name in op.appends}
    outputs = []
    for output in range(len(node.outputs)):
        if output in growing:
            name = growing[output]
            position, axis = names.index(name), op.appends[name]
            filled = arrays[position].shape[axis] + _entries(node, name)
            outputs.append(backend.to_host(tensors[position].data).take(range(filled), axis=axis))
        else:
            outputs.append(backend.to_host(next(returned)))
    assert next(returned, None) is None, f"{kernel.name} returned more than {op.name} has outputs"
    return tuple(outputs)


def _poisoned(backend: Backend, type_: TensorType) -> Any:
    dtype = type_.plain_dtype
    poison = {"float": np.nan, "int": 99, "bool": True}[dtype.kind]
    return backend.from_host(np.full(type_.static_shape(), poison, dtype.numpy))


def _roomier(node: Node) -> Node:
    """The node with append states that are longer by ``ROOM``: what a plan for their buffers knows."""
    names = node.op.input_names()
    inputs, outputs = list(node.inputs), list(node.outputs)
    for name, axis in node.op.appends.items():
        for values, position in ((inputs, names.index(name)), (outputs, node.op.updates[name])):
            shape = list(values[position].type.shape)
            shape[axis] = shape[axis] + ROOM
            values[position] = replace(values[position], type=values[position].type.with_shape(*shape))
    return replace(node, inputs=tuple(inputs), outputs=tuple(outputs))


def _check_places(
    backend: Backend, kernel: Kernel, node: Node, made: Sequence[Any], given: Sequence[Any], out: Sequence[Any]
) -> None:
    """Outputs lie in ``out``, if given; a new state lies in memory of its own or in the old one, which is at its input's position
    in ``given`` (inputs and buffers)."""
    growing = {node.op.updates[name] for name in node.op.appends}
    old = {output: node.op.input_names().index(name) for name, output in node.op.updates.items()}
    wanted = iter(out)
    for output, tensor in zip((o for o in range(len(node.outputs)) if o not in growing), made, strict=False):
        array = _host(backend, tensor)
        if output not in old and out:
            buffer = backend.to_host(next(wanted))
            same = array.shape == buffer.shape and array.ctypes.data == buffer.ctypes.data
            assert same, f"{kernel.name} was given a buffer for output {output} of {node.op.name} and returned another"
        for position, other in enumerate(given if output in old else ()):
            shared = position != old[output] and np.shares_memory(array, _host(backend, other))
            assert not shared, f"the new state that {kernel.name} returns lies in input or buffer {position} of {node.op.name}"


def _host(backend: Backend, tensor: Any) -> Array:
    """The memory of a tensor, an append state or a quantised weight."""
    if isinstance(tensor, Appended | QuantizedArray):
        return backend.to_host(tensor.data)
    return backend.to_host(tensor)


def _entries(node: Node, name: str) -> int:
    """How many entries a run adds to the append state ``name``."""
    op, axis = node.op, node.op.appends[name]
    old = node.inputs[op.input_names().index(name)].type.static_shape()[axis]
    return node.outputs[op.updates[name]].type.static_shape()[axis] - old


def _buffer(backend: Backend, array: Array, axis: int, entries: int) -> Appended:
    shape = list(array.shape)
    shape[axis] = entries + ROOM
    data = np.concatenate([array, np.full(shape, RUBBISH, array.dtype)], axis=axis)
    return Appended(backend.from_host(data), backend.length(array.shape[axis]))


def _check_unchanged(
    backend: Backend, node: Node, arrays: Sequence[Value], tensors: Sequence[Any], layouts: dict[int, tuple[int, ...]]
) -> None:
    names = node.op.input_names()
    for position, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        if isinstance(array, QuantizedArray) or (position < len(names) and names[position] in node.op.updates):
            continue
        now = backend.to_host(tensor)
        before = array.transpose(layouts[position]) if position in layouts else array
        same = np.array_equal(now.astype(np.float64), before.astype(np.float64), equal_nan=True)
        assert same, f"the kernel for {node.op} changed its input {position}, which is no state"
