"""Generated cases made concrete: arrays in a dtype, their types, one-node graphs, and the ways to evaluate an op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from deltaloom.backends import backend as make_backend
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import interpret, type_of
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, TensorType, f64
from deltaloom.passes.rewrite.rule import Example

Value = Array | QuantizedArray


def draw_case(op: type[Op], draw: Draw) -> Case:
    """A case of ``op``; ``GraphError`` if it has no ``cases`` rule."""
    if op.cases is None:
        raise GraphError(f"op {op.name} has no cases rule, so it cannot be tested")
    return cast(Case, op.cases(draw))


def concrete(case: Case | Example, dtype: DType) -> tuple[Value, ...]:
    """The arrays of a case, or of a rule's example, in the dtype under test, as ``Case`` describes."""
    fixed = case.dtypes or (None,) * len(case.arrays)
    made: list[Value] = []
    for array, own in zip(case.arrays, fixed, strict=True):
        if isinstance(array, QuantizedArray) or array.dtype.kind in "iub":
            made.append(array)
        else:
            made.append(array.astype((dtype if dtype == f64 else own or dtype).numpy))
    return tuple(made)


def in_float64(arrays: tuple[Value, ...]) -> tuple[Value, ...]:
    """The same numbers with every plain float array in float64, so that a reference computes the truth."""
    return tuple(
        array if isinstance(array, QuantizedArray) or array.dtype.kind in "iub" else array.astype(np.float64) for array in arrays
    )


def reference(op: Op, arrays: tuple[Value, ...]) -> tuple[Array, ...]:
    """The op's definition, always as a tuple."""
    if op.reference is None:
        raise GraphError(f"op {op.name} has no reference")
    with np.errstate(all="ignore"):
        return as_tuple(op.reference(*arrays))


def as_tuple(results: Any) -> tuple[Any, ...]:
    """One result or several, as a tuple."""
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def one_node(op: Op, types: tuple[TensorType, ...], *, params: bool = False) -> Graph:
    """A graph of one node. With ``params`` every input that is no state is a parameter, as for a weight."""
    builder = GraphBuilder("case")
    names = op.input_names()
    values = []
    for position, type_ in enumerate(types):
        name = f"in{position}"
        is_weight = params and not (position < len(names) and names[position] in op.updates)
        if is_weight:
            values.append(builder.param(name, type_.shape, type_.dtype))
        else:
            values.append(builder.input(name, type_))
    for position, value in enumerate(as_tuple(builder.apply(op, *values))):
        builder.output(str(position), value)
    return builder.build()


def decomposed(op: Op, arrays: tuple[Value, ...]) -> tuple[Array, ...] | None:
    """The op's decomposition, interpreted; None where it has none."""
    builder = GraphBuilder("parts")
    values = [builder.input(f"in{position}", type_of(array)) for position, array in enumerate(arrays)]
    parts = None if op.decompose is None else op.decompose(builder, *values)
    if parts is None:
        return None
    for position, value in enumerate(as_tuple(parts)):
        builder.output(str(position), value)
    inputs = {f"in{position}": cast(Array, array) for position, array in enumerate(arrays)}
    results = interpret(builder.build(), inputs, lambda name: None, {})
    return tuple(results.outputs.values())


def _copied(array: Value) -> Value:
    return replace(array, data=array.data.copy(), scale=array.scale.copy()) if isinstance(array, QuantizedArray) else array.copy()


def torch_rule(op: Op, arrays: tuple[Value, ...]) -> tuple[Array, ...]:
    """The op's torch rule, on the CPU, with NumPy arrays in and out."""
    from deltaloom.backends.torch.portable import run

    if op.torch is None:
        raise GraphError(f"op {op.name} has no torch rule")
    backend = make_backend("torch")
    tensors = [backend.from_host(_copied(array)) for array in arrays]
    return tuple(backend.to_host(tensor) for tensor in as_tuple(run(op, *tensors)))
