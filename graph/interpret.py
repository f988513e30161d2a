"""The reference interpreter: runs a graph node by node through each op's ``reference``. It is the definition of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltaloom.graph.errors import GraphError, require
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DTYPES, DType, TensorType

Observer = Callable[[str, Any], None]


@dataclass
class Results:
    """Outputs by name, and the new value of every state by full name."""

    outputs: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


def interpret(
    graph: Graph,
    inputs: Mapping[str, Array],
    params: Callable[[str], Any],
    states: Mapping[str, Array],
    *,
    observe: Observer | None = None,
) -> Results:
    """Run ``graph``. ``params`` gives the array of a full parameter name; ``states`` holds every state by full name;
    ``observe(name, array)`` sees every value, named with its call's prefix. Raises ``GraphError`` for a missing input."""
    for value in graph.inputs:
        if value.name not in inputs:
            raise GraphError(f"graph '{graph.name}' needs the input '{value.name}: {value.type}', which was not given")
    results = Results()
    arguments = [inputs[value.name] for value in graph.inputs]
    outputs = _run(graph, graph, arguments, "", params, states, results.states, observe)
    results.outputs = {name: array for (name, _), array in zip(graph.outputs, outputs, strict=True)}
    return results


def run_node(node: Node, arrays: list[Any]) -> tuple[Any, ...]:
    """Evaluate one op by its reference, always giving a tuple."""
    op = node.op
    if op.reference is None:
        raise GraphError(f"op {op.name} has no reference, so %{node.name} cannot be interpreted")
    result = op.reference(*arrays)
    return result if isinstance(result, tuple) else (result,)


def dtype_of(array: Array) -> DType:
    """The graph's dtype of an array; ``GraphError`` where it has none."""
    for dtype in DTYPES.values():
        if dtype.numpy == array.dtype:
            return dtype
    raise GraphError(f"an array of {array.dtype} has no dtype in graphs; known are {', '.join(DTYPES)}")


def type_of(array: Array | QuantizedArray) -> TensorType:
    """The type of a value at run time."""
    if isinstance(array, QuantizedArray):
        form = array.form
        for name, part, dtype, shape in (
            ("codes", array.data, form.stored, form.data_shape(array.shape)),
            ("scales", array.scale, form.scale, form.scale_shape(array.shape)),
        ):
            fits = part.dtype == dtype.numpy and part.shape == shape
            require(fits, f"the {name} of a {array.type} are {part.dtype} {list(part.shape)}, expected {dtype} {list(shape)}")
        return array.type
    return dtype_of(array)[tuple(array.shape)]


def _run(
    top: Graph,
    graph: Graph,
    arguments: list[Any],
    prefix: str,
    params: Callable[[str], Any],
    states: Mapping[str, Array],
    new_states: dict[str, Any],
    observe: Observer | None,
) -> list[Any]:
    values: dict[Value, Any] = dict(zip(graph.inputs, arguments, strict=True))
    values.update({value: params(prefix + value.name) for value in graph.params})
    values.update({state.value: states[prefix + state.name] for state in graph.states})
    for node in graph.nodes:
        arrays = [values[value] for value in node.inputs]
        if isinstance(node.op, Call):
            region = top.region(node.op.region)
            outputs: Any = _run(top, region, arrays, node.op.prefix, params, states, new_states, observe)
        else:
            with np.errstate(all="ignore"):
                outputs = run_node(node, arrays)
        for value, array in zip(node.outputs, outputs, strict=True):
            values[value] = array
            if observe is not None:
                observe(prefix + value.name, array)
    new_states.update({prefix + name: values[value] for name, value in graph.updates})
    return [values[value] for _, value in graph.outputs]
