"""Checks of the laws that ops promise (``deltaloom.ops.laws``), on the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import numpy as np

from deltaloom.graph.op import Array, Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.ops.laws import ChunkInvariant, Idempotent, Law, PaddingIsNoOp, PermutationEquivariant, Streaming
from deltaloom.testing.evaluate import Value, as_tuple, reference
from deltaloom.testing.measure import assert_close

Arrays = dict[str, Array]


def check_law(law: Law, op: Op, arrays: tuple[Value, ...], draw: Draw) -> bool:
    """``AssertionError`` if ``op`` breaks ``law`` on the float64 ``arrays``; False if the law says nothing about them, or if one of
    them is quantised: how a weight is stored is no matter of the laws."""
    given = {name: array for name, array in zip(op.input_names(), arrays) if not isinstance(array, QuantizedArray)}
    if any(isinstance(array, QuantizedArray) for array in arrays):
        return False
    return _check(law, op, given, draw)


@singledispatch
def _check(law: object, op: Op, arrays: Arrays, draw: Draw) -> bool:
    raise TypeError(f"there is no check for the law {type(law).__name__}")


@_check.register
def _streaming(law: Streaming, op: Op, arrays: Arrays, draw: Draw) -> bool:
    seq = arrays[law.sequence[0]].shape[1]
    if seq < 2:
        return False
    cut = draw.integer(1, seq - 1)
    first = _map(arrays, law.sequence, lambda x: x[:, :cut])
    first = _map(first, law.prefix, lambda x: x[:, : x.shape[1] - seq + cut])
    early = reference(op, tuple(first.values()))
    second = _map(arrays, law.sequence, lambda x: x[:, cut:])
    second.update({name: early[output] for name, output in op.updates.items()})
    late = reference(op, tuple(second.values()))
    states = set(op.updates.values())
    for position, whole in enumerate(reference(op, tuple(arrays.values()))):
        parts = late[position] if position in states else np.concatenate([early[position], late[position]], axis=1)
        assert_close(f"output {position} of {op}, cut at {cut}", parts, whole, whole)
    return True


@_check.register
def _padding(law: PaddingIsNoOp, op: Op, arrays: Arrays, draw: Draw) -> bool:
    if not set(law.prefix) <= set(arrays):
        return False
    if law.starts_zero:
        arrays = _map(arrays, tuple(op.updates), np.zeros_like)
    seq, count = arrays[law.sequence[0]].shape[1], draw.integer(1, 3)
    padded = dict(arrays)
    for name in {*law.sequence, *law.prefix}:
        array = arrays[name]
        shape = (array.shape[0], count, *array.shape[2:])
        new = np.zeros(shape) if name in law.zero else draw.normal(*shape)
        padded[name] = np.insert(array, [array.shape[1] - seq] * count, new.astype(array.dtype), axis=1)
    results = reference(op, tuple(padded.values()))
    growing = {op.updates[name] for name in op.appends}
    states = set(op.updates.values())
    for position, plain in enumerate(reference(op, tuple(arrays.values()))):
        if position not in growing:
            kept = results[position] if position in states else results[position][:, count:]
            assert_close(f"output {position} of {op} after {count} padded positions", kept, plain, plain)
    return True


@_check.register
def _chunks(law: ChunkInvariant, op: Op, arrays: Arrays, draw: Draw) -> bool:
    chunk = draw.choice(64, 1, 2, 3, 16)
    chunked: Callable[..., tuple[Array, ...]] = getattr(op, "chunked")  # noqa: B009 - ops with this law have the method
    with np.errstate(all="ignore"):
        results = as_tuple(chunked(chunk, *arrays.values()))
    for position, (result, truth) in enumerate(zip(results, reference(op, tuple(arrays.values())), strict=True)):
        assert_close(f"output {position} of {op} in chunks of {chunk}", result, truth, truth)
    return True


@_check.register
def _permutation(law: PermutationEquivariant, op: Op, arrays: Arrays, draw: Draw) -> bool:
    batch = arrays[law.inputs[0]].shape[0]
    order = np.argsort(draw.uniform(0.0, 1.0, batch))
    names = tuple(name for name in law.inputs if name in arrays)
    permuted = reference(op, tuple(_map(arrays, names, lambda x: x[order]).values()))
    for position, plain in enumerate(reference(op, tuple(arrays.values()))):
        assert_close(f"output {position} of {op}, batch permuted", permuted[position], plain[order], plain[order])
    return len(order) > 1


@_check.register
def _idempotent(law: Idempotent, op: Op, arrays: Arrays, draw: Draw) -> bool:
    once = reference(op, tuple(arrays.values()))[0]
    _, *others = arrays.values()
    assert_close(f"{op} applied twice", reference(op, (once, *others))[0], once, once)
    return True


def _map(arrays: Arrays, names: tuple[str, ...], change: Callable[[Array], Array]) -> Arrays:
    """``arrays`` with those in ``names`` changed."""
    return {name: change(array) if name in names else array for name, array in arrays.items()}
