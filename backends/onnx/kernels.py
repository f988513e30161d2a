"""Which nodes ONNX Runtime can run: those whose op, or all of whose parts, have an ``onnx`` rule; and each of them by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from deltaloom.backends.onnx.segment import segment_model
from deltaloom.backends.onnx.session import SegmentSession
from deltaloom.graph.interpret import dtype_of
from deltaloom.graph.ir import Node, Value
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, TensorType, f32
from deltaloom.ops.fused import Fused, decomposition
from deltaloom.ops.serving import ServingForm
from deltaloom.passes.kernel import Appended, Kernel

TITLE = "portable"


def kernel_of(op: type[Op], backend: str, threads: int) -> Kernel | None:
    """The kernel for ``op``: None where it has no ``onnx`` rule and is not made of other ops, and for those of serving programs,
    whose pools of states are no values of a model."""
    if op.onnx is None and not issubclass(op, Fused) or issubclass(op, ServingForm):
        return None
    return Kernel(op.name, backend, _alone(threads), when=(exportable,), title=TITLE, portable=True)


def exportable(node: Node) -> str | None:
    """A guard: floats are float32, and the op or all of its parts have an ``onnx`` rule."""
    for value in (*node.inputs, *node.outputs):
        dtype = value.type.dtype
        if isinstance(dtype, QuantType) or dtype.kind == "float" and dtype != f32:
            return f"{value} is {dtype}, and programs for ONNX Runtime are float32"
    return unexportable(node.op, tuple(value.type for value in node.inputs))


@lru_cache(maxsize=1024)
def unexportable(op: Op, types: tuple[TensorType, ...]) -> str | None:
    """Why there is no ONNX model of ``op``, or None."""
    if op.onnx is not None:
        return None
    parts = decomposition(op, types)
    if parts is None:
        return f"op {op.name} has neither an onnx rule nor a decomposition"
    for node in parts.nodes:
        if (reason := unexportable(node.op, tuple(value.type for value in node.inputs))) is not None:
            return reason if node.op.name in reason else f"{node.op.name}: {reason}"
    return None


def _alone(threads: int) -> Callable[..., Any]:
    """A kernel that runs a node as a model of its own, as segments are not: for looking at programs node by node."""

    @lru_cache(maxsize=64)
    def made(op: Op, types: tuple[TensorType, ...]) -> SegmentSession:
        inputs = tuple(Value(f"in{position}", type_) for position, type_ in enumerate(types))
        outputs = tuple(Value(f"out{position}", type_) for position, type_ in enumerate(op.output_types(*types)))
        node = Node(op, inputs, outputs)
        grown = {op.updates[name] for name in op.appends}
        results = [value for position, value in enumerate(outputs) if position not in grown]
        return SegmentSession(op.name, lambda: segment_model(op.name, [node], inputs, results), threads)

    def run(op: Op, *inputs: Any) -> Any:
        axes = {op.input_names().index(name): axis for name, axis in op.appends.items()}
        types = tuple(_type(given, axes.get(position, 0)) for position, given in enumerate(inputs))
        results = made(op, types)(*inputs)
        return results[0] if len(results) == 1 else results

    return run


def _type(given: Any, axis: int) -> TensorType:
    assert not isinstance(given, QuantizedArray)
    if isinstance(given, Appended):
        shape = list(given.data.shape)
        shape[axis] = int(given.length)
        return dtype_of(given.data)[tuple(shape)]
    return dtype_of(np.asarray(given))[tuple(given.shape)]
