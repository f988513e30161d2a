"""A lifted layer graph as an ONNX model: regions unrolled, a node a call of its op's function, states as inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import helper

from deltaloom.backends.onnx.body import ELEMENTS, Body, tensor_dims
from deltaloom.backends.onnx.functions import DOMAIN, Library
from deltaloom.graph.dims import symbol
from deltaloom.graph.ir import Call, Graph, Value
from deltaloom.graph.op import Op
from deltaloom.graph.types import TensorType, bool_, i64

IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 11, 25: 12, 26: 13, 27: 13}
"""Version of the standard ops -> of the file format: the library's own default is refused by every runtime of a few months ago."""

INPUTS = {
    "token_ids": "input_ids",
    "next_ids": "input_ids",
    "positions": "position_ids",
    "valid": "attention_mask",
    "hidden": "hidden_states",
}
"""Inputs of our graphs -> names that users of ONNX know."""

SYMBOLS = {"batch": "batch_size", "seq": "sequence_length", "past": "past_sequence_length", "past + seq": "total_sequence_length"}
"""Symbols of our types -> names of symbolic dimensions."""

SEQ = symbol("seq")
StateNames = Callable[[str], tuple[str, str]]
"""Full name of a state -> the names of its input and output."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the model under its full name; ``graph`` (a layer's body) carries the weight graph that makes it."""

    name: str
    prefix: str
    graph: Graph
    value: Value


@dataclass
class Model:
    """What was built: the graph without its initialisers, and the parameters that it reads."""

    nodes: list[onnx.NodeProto]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    functions: list[onnx.FunctionProto]
    weights: list[Weight] = field(default_factory=list)

    def proto(
        self, name: str, opset: int, producer: str, initializers: Sequence[onnx.TensorProto], before: Sequence[onnx.NodeProto] = ()
    ) -> onnx.ModelProto:
        """The whole model; ``before`` are nodes that prepare weights."""
        graph = helper.make_graph([*before, *self.nodes], name, self.inputs, self.outputs, initializer=list(initializers))
        imports = [helper.make_opsetid("", opset)]
        if self.functions:
            imports.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_model(
            graph, functions=self.functions, opset_imports=imports, ir_version=IR_VERSIONS[opset], producer_name="deltaloom",
            producer_version=producer,
        )  # fmt: skip


class ModelBuilder:
    """Walks a graph whose weights are lifted."""

    def __init__(self, graph: Graph, library: Library, state_names: StateNames) -> None:
        self._graph = graph
        self._library = library
        self._state_names = state_names
        self._body = Body(library)
        self._weights: dict[str, Weight] = {}
        self._updates: dict[str, str] = {}

    def build(self) -> Model:
        """The model of the graph."""
        inputs = []
        names: dict[Value, str] = {}
        for value in self._graph.inputs:
            inputs.append(self._input(value, names))
        for full, state in self._graph.all_states().items():
            name, _ = self._state_names(full)
            self._body.name(name)
            inputs.append(_info(name, state.value.type))
        outputs = self._outputs(self._walk(self._graph, "", names))
        functions = list(self._library.functions.values())
        return Model(self._body.nodes, inputs, outputs, functions, list(self._weights.values()))

    def _input(self, value: Value, names: dict[Value, str]) -> onnx.ValueInfoProto:
        """Declare an input; a mask comes as int64 and token ids too, as tokenizers give them."""
        known = INPUTS.get(value.name, value.name)
        given = value.type.with_dtype(i64) if value.type.plain_dtype == bool_ else value.type
        self._body.name(known)
        names[value] = known
        if given != value.type:
            self._body.dtypes[known] = i64
            names[value] = self._body.cast(known, value.type.plain_dtype)
        return _info(known, given)

    def _walk(self, graph: Graph, prefix: str, names: dict[Value, str]) -> list[str]:
        """Add the nodes of a graph, whose inputs have ``names``, and of what it calls; the names of its outputs."""
        for value in graph.params:
            names[value] = self._parameter(graph, prefix, value)
        for state in graph.states:
            names[state.value] = self._state_names(prefix + state.name)[0]
        for node in graph.nodes:
            given = [names[value] for value in node.inputs]
            if isinstance(node.op, Call):
                region = self._graph.region(node.op.region)
                made: Sequence[str] = self._walk(region, node.op.prefix, dict(zip(region.inputs, given, strict=True)))
            else:
                made = self._node(prefix, node.op, [v.type for v in node.inputs], given, node.outputs)
            names.update(zip(node.outputs, made, strict=True))
        for name, value in graph.updates:
            self._updates[prefix + name] = names[value]
        return [names[value] for _, value in graph.outputs]

    def _node(self, prefix: str, op: Op, types: Sequence[TensorType], given: Sequence[str], made: Sequence[Value]) -> list[str]:
        function, attributes, _ = self._library.function(op, tuple(types))
        names = [self._body.name(prefix + value.name) for value in made]
        scope = "/" + names[0].replace(".", "/")
        self._body.nodes.append(helper.make_node(function, list(given), names, name=scope, domain=DOMAIN, **attributes))
        return names

    def _parameter(self, graph: Graph, prefix: str, value: Value) -> str:
        name = prefix + value.name
        if name not in self._weights:
            self._body.name(name)
            self._weights[name] = Weight(name, prefix, graph, value)
        return name

    def _outputs(self, made: Sequence[str]) -> list[onnx.ValueInfoProto]:
        """Outputs under their public names, then the new states."""
        given = [(name, source, value.type) for (name, value), source in zip(self._graph.outputs, made, strict=True)]
        for full, state in self._graph.all_states().items():
            grown = state.value.type
            if state.append_axis is not None:
                shape = list(grown.shape)
                shape[state.append_axis] = shape[state.append_axis] + SEQ
                grown = grown.with_shape(*shape)
            given.append((self._state_names(full)[1], self._updates[full], grown))
        self._rename({source: public for public, source, _ in reversed(given)}, given)
        return [_info(public, type_) for public, _, type_ in given]

    def _rename(self, public: Mapping[str, str], given: Sequence[tuple[str, str, TensorType]]) -> None:
        """Give the values that leave the model their public names; what has another name already, or is an input, is copied."""
        produced = {name for node in self._body.nodes for name in node.output}
        chosen = {source: name for source, name in public.items() if source in produced}
        aside = {name: self._body.name(f"{name}.inner") for name in produced.intersection(public.values()) if name not in chosen}
        names = {**aside, **chosen}
        for node in self._body.nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        for name, source, _ in given:
            if chosen.get(source) != name:
                copied = names.get(source, source)
                self._body.nodes.append(helper.make_node("Identity", [copied], [name], name=f"give_{name}"))


def _info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[type_.plain_dtype], tensor_dims(type_, SYMBOLS))


KINDS = {"conv": "conv_state", "delta": "recurrent_state"}
"""Last part of a state's name -> its public one; others keep theirs."""


def portable_names(full: str) -> tuple[str, str]:
    """``model.layers.3.self_attn.key`` -> ``past_key_values.3.key`` and ``present.3.key``; outside layers names stay whole."""
    kind = full.rpartition(".")[2]
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", full)
    place = f"{layer[1]}.{KINDS.get(kind, kind)}" if layer else full
    return f"past_key_values.{place}", f"present.{place}"
