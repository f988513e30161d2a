"""Weights made on the device: the weight graph evaluated by the ops' torch rules on tensors that are there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltaloom.graph.errors import CheckpointError, GraphError
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType
from deltaloom.passes.emit import Program, WeightSlot

Read = Callable[[str], torch.Tensor]
"""A checkpoint tensor by its full name."""


def weights_of(program: Program, read: Read) -> dict[str, tuple[Any, ...]]:
    """The weights of a program by call prefix, in the order of its signatures; each is made once."""
    made: dict[tuple[str, str, tuple[int, ...]], Any] = {}

    def weight(prefix: str, graph: Graph, slot: WeightSlot) -> Any:
        assert graph.weights is not None
        value = graph.weights.output(slot.value.name)
        key = ("" if value.kind == "param" else graph.name, prefix + value.name, slot.axes)
        if key not in made:
            made[key] = evaluated(graph.weights, value, prefix, read, slot.axes)
        return made[key]

    return {
        one.prefix: tuple(weight(one.prefix, one.graph, slot) for slot in program.signatures[program.function(one.graph)].weights)
        for one in program.graph.instances()
    }


def _stored(found: Any, value: Value, axes: tuple[int, ...]) -> Any:
    if isinstance(found, QuantizedArray):
        return QuantizedArray(found.data.contiguous(), found.scale.contiguous(), found.form, found.shape)
    dtype: torch.dtype = getattr(torch, value.type.plain_dtype.long_name)
    return (found.permute(axes) if axes else found).to(dtype).contiguous()


def evaluated(
    weights: Graph, value: Value, prefix: str, read: Read, axes: tuple[int, ...], arrived: Callable[[], None] = lambda: None
) -> Any:
    """``value`` of a weight graph with its axes stored in the order ``axes``. What ``read`` gives may be on its way until
    ``arrived`` returns. ``CheckpointError`` for tensors of which it cannot be made."""
    with torch.no_grad():
        try:
            found = _evaluate(weights, value, prefix, read, arrived)
        except GraphError as error:
            raise CheckpointError(f"the weight '{prefix}{value.name}' cannot be made on the device: {error}") from error
        arrived()
        return _stored(found, value, axes)


def _evaluate(weights: Graph, value: Value, prefix: str, read: Read, arrived: Callable[[], None]) -> Any:
    """``value`` of a weight graph; what only it needs is gone when it is there."""
    if value.kind == "param":
        return _parameter(value, prefix + value.name, read, arrived)
    node = weights.producers[value.name]
    inputs = [_evaluate(weights, item, prefix, read, arrived) for item in node.inputs]
    arrived()
    results = node.op.torch(torch, *inputs)  # type: ignore[misc]
    return results[node.outputs.index(value)] if isinstance(results, (tuple, list)) else results


def _parameter(value: Value, name: str, read: Read, arrived: Callable[[], None]) -> Any:
    form = value.type.dtype
    found = read(name)
    if isinstance(form, QuantType):
        return QuantizedArray(found, read(f"{name}_scale_inv"), form, value.type.static_shape())
    dtype: torch.dtype = getattr(torch, form.long_name)
    if found.dtype != dtype:
        arrived()
    return found.to(dtype)
