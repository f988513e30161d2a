"""Weights made on the device: the weight graph evaluated by the ops' torch rules on tensors that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from deltaloom.graph.errors import CheckpointError, GraphError
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray
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


def evaluated(weights: Graph, value: Value, prefix: str, read: Read, axes: tuple[int, ...]) -> Any:
    """``value`` of a weight graph with its axes stored in the order ``axes``. ``CheckpointError`` for tensors of which it cannot be
    made."""
    with torch.no_grad():
        try:
            return _stored(_evaluate(weights, value, prefix, read), value, axes)
        except GraphError as error:
            raise CheckpointError(f"the weight '{prefix}{value.name}' cannot be made on the device: {error}") from error


def stored_names(weights: Graph, value: Value, prefix: str) -> Iterator[str]:
    """The checkpoint tensors of which ``value`` is made, in the order in which it asks for them."""
    if value.kind != "param":
        for item in weights.producers[value.name].inputs:
            yield from stored_names(weights, item, prefix)
        return
    yield prefix + value.name
    if isinstance(value.type.dtype, QuantType):
        yield prefix + value.name + SCALE_SUFFIX


def _evaluate(weights: Graph, value: Value, prefix: str, read: Read) -> Any:
    """``value`` of a weight graph; what only it needs is gone when it is there."""
    if value.kind == "param":
        return _parameter(value, prefix + value.name, read)
    node = weights.producers[value.name]
    inputs = [_evaluate(weights, item, prefix, read) for item in node.inputs]
    results = node.op.torch(torch, *inputs)  # type: ignore[misc]
    return results[node.outputs.index(value)] if isinstance(results, (tuple, list)) else results


def _parameter(value: Value, name: str, read: Read) -> Any:
    form = value.type.dtype
    if not isinstance(form, QuantType):
        return read(name).to(getattr(torch, form.long_name))
    return QuantizedArray(read(name), read(name + SCALE_SUFFIX), form, value.type.static_shape())
