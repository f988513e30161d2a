"""A lifted layer graph as an ONNX model: a node is a call of its op's function, states are inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import helper
from onnx.inliner import inline_local_functions

from deltaloom.backends.onnx.body import ELEMENTS, Body, tensor_dims
from deltaloom.backends.onnx.dequantize import SCALE, dequantizer, is_quantised
from deltaloom.backends.onnx.flat import Flat, Weight, flatten
from deltaloom.backends.onnx.functions import DOMAIN, Library
from deltaloom.backends.onnx.names import INPUTS, SYMBOLS, Naming, path_name, portable_names
from deltaloom.backends.onnx.problems import Problem, UnexportableError, checked, problem
from deltaloom.backends.onnx.profiles import IR_VERSIONS
from deltaloom.graph.errors import DeltaloomError, ExportError, require
from deltaloom.graph.ir import Graph, Node, State, Value
from deltaloom.graph.types import TensorType, bool_, i64


@dataclass(frozen=True)
class File:
    """A model as it is written, and what is in it by name."""

    content: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    functions: tuple[str, ...]
    ir_version: int


def file_of(model: onnx.ModelProto, *, functions: bool = True) -> File:
    """``model`` as a file; without ``functions``, with their bodies in place of their calls."""
    whole = model if functions else inline_local_functions(model)
    inputs, outputs, blocks = (
        tuple(one.name for one in found) for found in (whole.graph.input, whole.graph.output, whole.functions)
    )
    return File(whole.SerializeToString(), inputs, outputs, blocks, whole.ir_version)


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
        used = {one.domain: one.version for function in self.functions for one in function.opset_import}
        versions = {"": opset} | ({DOMAIN: 1} if self.functions else {}) | used
        imports = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
        return helper.make_model(
            graph, functions=self.functions, opset_imports=imports, ir_version=IR_VERSIONS[opset], producer_name="deltaloom",
            producer_version=producer,
        )  # fmt: skip


class ModelBuilder:
    """Walks a graph whose weights are lifted. ``outputs``: names of outputs -> their public ones, where they differ."""

    def __init__(
        self,
        graph: Graph | Flat,
        library: Library,
        state_names: Naming = portable_names,
        *,
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        self._flat = graph if isinstance(graph, Flat) else flatten(graph)
        self._graph = self._flat.graph
        self._library = library
        self._state_names = state_names
        self._public = outputs or {}
        self._body = Body(library)
        self._names: dict[Value, str] = {}
        self._plain: dict[tuple[Value, object], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []

    def build(self) -> Model:
        """The model of the graph. ``UnexportableError`` with all nodes that have no ONNX form."""
        for value in self._graph.inputs:
            self._input(value)
        for state in self._graph.states:
            self._state(state)
        for value in self._graph.params:
            self._names[value] = self._body.name(value.name)
            if is_quantised(value.type):
                self._body.name(value.name + SCALE)
        problems = [found for node in self._graph.nodes if (found := self._node(node)) is not None]
        if problems:
            raise UnexportableError(problems, self._library.profile.name, self._library.profile.opset)
        outputs = self._outputs()
        weights = [self._flat.weights[value.name] for value in self._graph.params]
        return Model(self._body.nodes, self._inputs, outputs, list(self._library.functions.values()), weights)

    def _input(self, value: Value) -> None:
        """Declare an input; a mask comes as int64, as tokenizers give it."""
        given = value.type.with_dtype(i64) if value.type.plain_dtype == bool_ else value.type
        known = self._body.name(INPUTS.get(value.name, value.name))
        self._names[value] = known
        if given != value.type:
            self._body.dtypes[known] = i64
            self._names[value] = self._body.cast(known, value.type.plain_dtype)
        self._inputs.append(_info(known, given))

    def _state(self, state: State) -> None:
        """Declare a state's input; of what its consumer keeps in front of it, nothing is read."""
        names, type_ = self._state_names(state.name), state.value.type
        known = self._names[state.value] = self._body.name(names.past)
        self._body.dtypes[known] = type_.plain_dtype
        if names.extra:
            self._names[state.value] = self._body.slice(known, type_.rank - 1, names.extra)
        self._inputs.append(_info(known, _wider(type_, names.extra)))

    def _node(self, node: Node) -> Problem | None:
        """Add a call of the op's function; what is wrong with the node, if anything."""
        made = [self._body.name(value.name) for value in node.outputs]
        self._names.update(zip(node.outputs, made, strict=True))
        if (found := checked(node)) is not None:
            return found
        first = node.inputs[0].type if node.inputs else None
        types = tuple(first.with_shape(*v.type.shape) if is_quantised(v.type) and first else v.type for v in node.inputs)
        try:
            function, attributes, _ = self._library.function(node.op, types)
        except DeltaloomError as error:
            return problem(node, str(error))
        except Exception as error:  # a rule of a plugin may fail with anything
            return problem(node, f"its onnx rule failed: {type(error).__name__}: {error}")
        given = [self._given(value, type_) for value, type_ in zip(node.inputs, types, strict=True)]
        self._body.nodes.append(helper.make_node(function, given, made, name=path_name(node.name), domain=DOMAIN, **attributes))
        return None

    def _given(self, value: Value, type_: TensorType) -> str:
        """The name of an input of a node; a quantised weight is made plain once for all that read it."""
        if value.type == type_:
            return self._names[value]
        key = (value, type_.dtype)
        if key not in self._plain:
            name = self._names[value]
            function = dequantizer(self._library, value.type, type_.plain_dtype)
            plain = self._plain[key] = self._body.name(f"{name}.dequantized")
            node = helper.make_node(
                function, [name, name + SCALE], [plain], name=path_name(plain.removeprefix("model.")), domain=DOMAIN
            )
            self._body.nodes.append(node)
        return self._plain[key]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        """Outputs under their public names, then the new states."""
        given = [(self._public.get(name, name), self._names[value], value.type) for name, value in self._graph.outputs]
        updates = dict(self._graph.updates)
        for state in self._graph.states:
            names, grown = self._state_names(state.name), state.value.type
            if state.append_axis is not None:
                shape = list(grown.shape)
                shape[state.append_axis] = updates[state.name].type.shape[state.append_axis]
                grown = grown.with_shape(*shape)
            source = self._names[updates[state.name]]
            if names.extra:
                zeros = self._body.ints(*[0] * (grown.rank - 1), names.extra, *[0] * grown.rank)
                self._body.dtypes[source] = grown.plain_dtype
                source = self._body.Pad(source, zeros)
            given.append((names.present, source, _wider(grown, names.extra)))
        self._require_apart([public for public, _, _ in given])
        self._rename({source: public for public, source, _ in reversed(given)}, given)
        return [_info(public, type_) for public, _, type_ in given]

    def _require_apart(self, outputs: Sequence[str]) -> None:
        """Nothing that a user names may be called like something else."""
        params = self._graph.params
        scales = [value.name + SCALE for value in params if is_quantised(value.type)]
        taken = Counter([*(one.name for one in self._inputs), *(value.name for value in params), *scales, *outputs])
        twice = next((name for name, count in taken.items() if count > 1), None)
        found = f"graph '{self._graph.name}' has two inputs, weights or outputs that an ONNX model would call '{twice}'"
        require(twice is None, f"{found}; give one of them another name", ExportError)

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


def _wider(type_: TensorType, extra: int) -> TensorType:
    return type_.with_shape(*type_.shape[:-1], type_.shape[-1] + extra) if extra else type_


def _info(name: str, type_: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[type_.plain_dtype], tensor_dims(type_, SYMBOLS))
