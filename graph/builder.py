"""Graphs are built by plain functions: ``h = g.rms_norm(h, g.param("norm.weight", [2048]), eps=1e-6)``.

A builder method exists for every op of the registry, plugins included. The builder is passed around; there is no current graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Call, Graph, Node, State, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.op import Op
from deltaloom.graph.registry import OpRegistry, ops
from deltaloom.graph.types import DType, QuantType, TensorType, f32


class OpMethod:
    """``g.NAME``, or ``g.PLUGIN.NAME``: adds one node; positional arguments are values, keywords are the op's attributes, ``name``
    names the result."""

    def __init__(self, builder: GraphBuilder, op: type[Op]) -> None:
        self._builder = builder
        self._op = op

    def __call__(self, *inputs: Value, name: str | None = None, **attributes: Any) -> Any:
        known = {field.name for field in fields(self._op)}  # type: ignore[arg-type]
        if unknown := sorted(set(attributes) - known):
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise GraphError(f"op {self._op.name} has no attribute '{unknown[0]}'; {has}")
        return self._builder.apply(self._op(**attributes), *inputs, name=name)


class GraphBuilder:
    """Collects nodes for one graph or region. ``dtype`` is the model's dtype, the default of ``param``."""

    def __init__(self, name: str, *, dtype: DType = f32, registry: OpRegistry = ops) -> None:
        self.name = name
        self.dtype = dtype
        self._registry = registry
        self._scope = ""
        self._taken: set[str] = set()
        self._inputs: list[Value] = []
        self._params: dict[str, Value] = {}
        self._states: dict[str, State] = {}
        self._nodes: list[Node] = []
        self._outputs: dict[str, Value] = {}
        self._updates: dict[str, Value] = {}
        self._regions: dict[str, Graph] = {}

    def __getattr__(self, name: str) -> Any:
        return self._registry.attribute(name, self._method)

    def _method(self, op: type[Op]) -> Callable[..., Any]:
        """What adds a node of ``op``."""
        return OpMethod(self, op)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names made inside start with ``name.``; scopes nest."""
        before = self._scope
        self._scope = f"{before}{name}."
        try:
            yield
        finally:
            self._scope = before

    def input(self, name: str, type_: TensorType) -> Value:
        """Declare an input of the graph; its name is not scoped."""
        value = Value(self._unique(name), type_, "input")
        self._inputs.append(value)
        return value

    def param(self, name: str, shape: Sequence[Dim], dtype: DType | QuantType | None = None) -> Value:
        """A weight named as in the checkpoint, relative to the scope; asking twice gives the same value."""
        full = self._scope + name
        type_ = TensorType(dtype or self.dtype, tuple(shape))
        known = self._params.get(full)
        if known is not None and known.type != type_:
            raise GraphError(f"parameter '{full}' was declared as {known.type} and is now asked for as {type_}")
        return self._params.setdefault(full, Value(full, type_, "param"))

    def state(self, name: str, type_: TensorType, *, append_axis: int | None = None) -> Value:
        """Declare state, relative to the scope: fixed in size, or growing along ``append_axis``."""
        full = self._scope + name
        if full in self._states:
            raise GraphError(f"state '{full}' is declared twice")
        value = Value(full, type_, "state")
        self._states[full] = State(value, append_axis)
        return value

    def update(self, **values: Value) -> None:
        """Give states of the current scope their new values."""
        for name, value in values.items():
            full = self._scope + name
            if full not in self._states:
                raise GraphError(f"there is no state '{full}' to update; declared are {', '.join(self._states) or 'none'}")
            self._updates[full] = value

    def output(self, name: str, value: Value) -> None:
        """Make ``value`` an output called ``name``."""
        if name in self._outputs:
            raise GraphError(f"output '{name}' of graph '{self.name}' is given twice")
        self._outputs[name] = value

    def call(self, region: Graph, *inputs: Value, prefix: str, name: str | None = None) -> Any:
        """Run ``region`` with its parameters and states under ``prefix``; gives its outputs (one value, or a tuple)."""
        if self._regions.setdefault(region.name, region) != region:
            raise GraphError(f"two different regions are called '{region.name}'")
        wanted = tuple(value.type for value in region.inputs)
        if (given := tuple(value.type for value in inputs)) != wanted:
            raise GraphError(f"region '{region.name}' takes {_list(wanted)}, got {_list(given)}")
        types = tuple(value.type for _, value in region.outputs)
        base = name or prefix.strip(".").removeprefix("model.")
        names = [f"{base}.{key}" for key, _ in region.outputs]
        return self._emit(Call(region=region.name, prefix=prefix), inputs, types, names)

    def apply(self, op: Op, *inputs: Value, name: str | None = None) -> Any:
        """Add one node; gives its output, or a tuple where the op has several."""
        for position, value in enumerate(inputs):
            if not isinstance(value, Value):
                raise GraphError(f"input {position} of {op.name} is {type(value).__name__}, expected a graph value")
        try:
            types = op.output_types(*(value.type for value in inputs))
        except GraphError as error:
            error.add_note(f"  in {op} at {self._scope or self.name} ({_caller()}), inputs {_list(v.type for v in inputs)}")
            raise
        base = name or op.name.rpartition(".")[2]
        if len(types) == 1:
            names = [base]
        else:
            suffixes = op.outputs if len(op.outputs) == len(types) else tuple(map(str, range(len(types))))
            names = [base if s == "out" else f"{base}.{s}" for s in suffixes]
        return self._emit(op, inputs, types, [self._scope + n for n in names])

    def build(self) -> Graph:
        """The finished graph."""
        missing = [name for name in self._states if name not in self._updates]
        if missing:
            raise GraphError(f"state '{missing[0]}' of graph '{self.name}' is never updated")
        return Graph(
            self.name,
            tuple(self._inputs),
            tuple(self._params.values()),
            tuple(self._states.values()),
            tuple(self._nodes),
            tuple(self._outputs.items()),
            tuple(self._updates.items()),
            dict(self._regions),
        )

    def _emit(self, op: Op, inputs: tuple[Value, ...], types: tuple[TensorType, ...], names: list[str]) -> Any:
        outputs = tuple(Value(self._unique(n), t) for n, t in zip(names, types, strict=True))
        self._nodes.append(Node(op, inputs, outputs, self._scope.rstrip("."), _caller()))
        return outputs[0] if len(outputs) == 1 else outputs

    def _unique(self, name: str) -> str:
        found = free_name(name, self._taken)
        self._taken.add(found)
        return found


def _caller() -> str:
    """``folder/file.py:line`` of the nearest frame outside this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno}"


def _list(types: Any) -> str:
    return ", ".join(str(t) for t in types) or "nothing"
