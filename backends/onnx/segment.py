"""Neighbouring nodes as one ONNX model: weights are inputs too, and of a state that grows only what is new is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from deltaloom import __version__
from deltaloom.backends.onnx.body import ELEMENTS, Body, tensor_dims
from deltaloom.backends.onnx.functions import DOMAIN, Library
from deltaloom.backends.onnx.profiles import profile
from deltaloom.graph.ir import Node, Value
from deltaloom.graph.types import TensorType

PROFILE = profile("portable")
"""What every ONNX Runtime that is supported knows."""


@dataclass(frozen=True)
class Growth:
    """An append state: the position of its input, its axis, and the value that is the new state."""

    position: int
    axis: int
    new: Value


@dataclass(frozen=True)
class SegmentModel:
    """A model of some nodes: names of its inputs and outputs, in order. Its last outputs are the entries that were added to the
    states in ``grown``."""

    proto: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grown: tuple[Growth, ...]


def segment_model(title: str, nodes: Sequence[Node], inputs: Sequence[Value], results: Sequence[Value]) -> SegmentModel:
    """The model of ``nodes``, which has an input for each of ``inputs`` and gives ``results`` and what is new of growing states.
    ``ExportError`` for a node whose op has neither an ``onnx`` rule nor parts that have one."""
    library = Library(PROFILE)
    body = Body(library)
    names = {value: body.name(value.name) for value in inputs}
    given = [_info(names[value], value.type) for value in inputs]
    grown = _growths(nodes, inputs)
    for node in nodes:
        function, attributes, _ = library.function(node.op, tuple(value.type for value in node.inputs))
        names.update({value: body.name(value.name) for value in node.outputs})
        arguments = [names[value] for value in node.inputs]
        made = [names[value] for value in node.outputs]
        body.nodes.append(helper.make_node(function, arguments, made, name=made[0], domain=DOMAIN, **attributes))
    outputs = [(names[value], value.type) for value in results]
    for growth in grown:
        state = inputs[growth.position]
        body.dtypes[names[state]] = body.dtypes[names[growth.new]] = state.type.plain_dtype
        filled = body.Shape(names[state], start=growth.axis, end=growth.axis + 1)
        outputs.append((body.slice(names[growth.new], growth.axis, filled), _added(state.type, growth)))
    public = _apart(body, outputs, {names[value] for value in inputs})
    graph = helper.make_graph(body.nodes, title, given, [_info(name, type_) for name, (_, type_) in zip(public, outputs)])
    proto = helper.make_model(
        graph, functions=list(library.functions.values()), ir_version=PROFILE.ir_version, producer_name="deltaloom",
        opset_imports=[helper.make_opsetid("", PROFILE.opset), helper.make_opsetid(DOMAIN, 1)], producer_version=__version__,
    )  # fmt: skip
    return SegmentModel(proto, tuple(names[value] for value in inputs), tuple(public), grown)


def _growths(nodes: Sequence[Node], inputs: Sequence[Value]) -> tuple[Growth, ...]:
    """The append states among ``inputs``, with what they become."""
    position = {value: number for number, value in enumerate(inputs)}
    return tuple(
        Growth(position[node.inputs[node.op.input_names().index(name)]], axis, node.outputs[node.op.updates[name]])
        for node in nodes
        for name, axis in node.op.appends.items()
    )


def _added(type_: TensorType, growth: Growth) -> TensorType:
    """The type of the new entries: as many as the new state has more."""
    shape = list(type_.shape)
    shape[growth.axis] = growth.new.type.shape[growth.axis] - shape[growth.axis]
    return type_.with_shape(*shape)


def _apart(body: Body, outputs: Sequence[tuple[str, TensorType]], inputs: set[str]) -> list[str]:
    """Names of outputs, each once: what is an input too, or given twice, is copied."""
    public: list[str] = []
    for name, _ in outputs:
        fresh = name
        if name in inputs or name in public:
            fresh = body.name(name)
            body.nodes.append(helper.make_node("Identity", [name], [fresh], name=fresh))
        public.append(fresh)
    return public


_NO_SYMBOLS: Mapping[str, str] = {}


def _info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[type_.plain_dtype], tensor_dims(type_, _NO_SYMBOLS))
