"""The ways to run a model that can be compared: a configuration's programs, the definition, and a divided model in lock step.

Each runs step after step on the same tokens, and shows every value by its name in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray
from deltaloom.graph.types import QuantType
from deltaloom.passes.driver import Variant
from deltaloom.passes.emit import returned_values
from deltaloom.passes.kernel import Tensor
from deltaloom.passes.shard.layout import read_layout
from deltaloom.passes.shard.plan import Mesh
from deltaloom.runtime.executor import positions
from deltaloom.runtime.lockstep import LockStep
from deltaloom.runtime.model import Model
from deltaloom.runtime.observe import observe
from deltaloom.runtime.weights import TensorSource, materialise

LAST = "last_logits"


@dataclass(frozen=True)
class Place:
    """Where a value is made: the node, its prefix, and the body that it is in."""

    node: Node
    prefix: str
    body: Graph


@dataclass
class Step:
    """What one step made, in order: values by name, their places, and the states after it by full name."""

    values: dict[str, Array] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    states: dict[str, Array] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    """Values that ranks must have in common and do not: name -> what was found."""

    @property
    def logits(self) -> Array:
        """``[batch, 1, vocab]`` of the last token."""
        return self.values[LAST]


class Side(Protocol):
    """A way to run a model, at the start of a text."""

    title: str

    def step(self, ids: Array) -> Step:
        """Go on with token ids ``[batch, n]``."""

    def updater(self, state: str) -> Place | None:
        """The node that makes the new value of a state."""


def places(graph: Graph) -> dict[str, tuple[str, Place]]:
    """Name with the call's prefix -> name as shown (``layers.3.x``) and place, of every value of a model but calls' outputs."""
    found = {}
    for instance in graph.instances():
        for node in instance.graph.nodes:
            if not isinstance(node.op, Call):
                for value in node.outputs:
                    shown = shown_name(instance.prefix, value)
                    found[instance.prefix + value.name] = (shown, Place(node, instance.prefix, instance.graph))
    return found


def shown_name(prefix: str, value: Value) -> str:
    """The name of a value in the whole model, whatever the checkpoint's names begin with."""
    return prefix.removeprefix("model.") + value.name


def updater(graph: Graph, state: str) -> Place | None:
    """The node of ``graph`` that makes the new value of the state with this full name."""
    for instance in graph.instances():
        for name, value in instance.graph.updates:
            if instance.prefix + name == state and value.name in instance.graph.producers:
                return Place(instance.graph.producers[value.name], instance.prefix, instance.graph)
    return None


class ProgramSide:
    """A loaded model, its programs run node by node with their kernels."""

    def __init__(self, title: str, model: Model, batch: int = 1) -> None:
        self.title = title
        self.model = model
        self.state = model.new_state(batch)
        self.graph = model.main.program(_variant(1)).graph

    def step(self, ids: Array, on_arguments: Any = None, on_node: Any = None) -> Step:
        """One step; ``on_arguments`` and ``on_node`` see its nodes too, as ``observe`` describes."""
        found = Step()
        known = places(self.model.main.program(_variant(ids.shape[1])).graph)
        prefixes = dict(known.values())

        def note(name: str, node: Node, outputs: Sequence[Tensor], seconds: float) -> None:
            scope = name.removesuffix(node.name)
            backend = self.model.ctx.backends[0] if node.placement is None else self.model.ctx.backend(node.placement.backend)
            for value, tensor in zip(returned_values(node), outputs, strict=True):
                array = backend.to_host(tensor)
                if not isinstance(array, QuantizedArray):
                    found.values[scope + value.name] = np.array(array)
                    found.places[scope + value.name] = prefixes[scope + value.name]
            if on_node is not None:
                on_node(name, node, outputs, seconds)

        observe(self.model.main, {"token_ids": ids}, self.state, None, (LAST,), note, on_arguments)
        found.states = self.state.arrays()
        return found

    def updater(self, state: str) -> Place | None:
        """The node that makes the new value of a state."""
        return updater(self.graph, state)

    def rewrites(self, place: Place) -> tuple[str, ...]:
        """Pass and rule of the rewrites that made a node, in their order."""
        names = {*(value.name for value in place.node.outputs), *place.node.origins}
        found = [
            f"{row.name}: {event.rule}"
            for row in self.model.main.driver.ledgers["shared"]
            for event in row.events
            if event.kind == "hit" and event.graph == place.body.name and event.node in names
        ]
        return tuple(dict.fromkeys(found))


def _variant(count: int) -> Variant:
    return Variant(count == 1, False, (LAST,))


class ReferenceSide:
    """A graph by the definitions of its ops, in the dtypes that it has. Its weights come from a checkpoint."""

    def __init__(self, title: str, graph: Graph, source: TensorSource, batch: int = 1) -> None:
        self.title = title
        self.graph = graph
        self.batch = batch
        self.length = 0
        self.states = zero_states(graph, batch)
        self._params = Weights(graph, source)
        self._places = places(graph)

    def step(self, ids: Array) -> Step:
        """One step."""
        found = Step()

        def note(name: str, array: Any) -> None:
            if name in self._places and not isinstance(array, QuantizedArray):
                shown, place = self._places[name]
                found.values[shown], found.places[shown] = array, place

        inputs = step_inputs(self.graph, ids, self.length)
        results = interpret(self.graph, inputs, self._params, self.states, observe=note)
        found.values.setdefault(LAST, results.outputs[LAST])
        self.states = found.states = results.states
        self.length += ids.shape[1]
        return found

    def updater(self, state: str) -> Place | None:
        """The node that makes the new value of a state."""
        return updater(self.graph, state)


class RanksSide:
    """A divided graph with its weights lifted, run on all ranks in lock step; values are put together from their parts."""

    def __init__(self, title: str, graph: Graph, mesh: Mesh, source: TensorSource, batch: int = 1) -> None:
        self.title = title
        self.graph = graph
        self.batch = batch
        self.length = 0
        self._ranks = int(np.prod(list(mesh.values())))
        self._run = LockStep(graph, mesh, source)
        self._states: Sequence[Mapping[str, Array]] = self._run.start(batch)
        self._places = places(graph)

    def step(self, ids: Array) -> Step:
        """One step. ``GraphError`` where ranks differ in an output is kept as a fault of that output."""
        found = Step()

        def note(name: str, value: Value, arrays: Sequence[Any]) -> None:
            if name not in self._places or any(isinstance(array, QuantizedArray) for array in arrays):
                return
            shown, place = self._places[name]
            found.values[shown], found.places[shown] = self._whole(value, arrays), place
            if not value.sharding and any(not np.array_equal(array, arrays[0], equal_nan=True) for array in arrays):
                found.faults[shown] = "the ranks must have it in common, and differ"

        inputs = step_inputs(self.graph, ids, self.length)
        try:
            results = self._run.run(inputs, self._states, note)
        except GraphError:
            if not found.faults:
                raise
            return found
        self._states = results.states
        found.values.setdefault(LAST, results.outputs[LAST])
        declared = self.graph.all_states()
        for name, state in declared.items():
            found.states[name] = self._whole(state.value, [own[name] for own in self._states])
        self.length += ids.shape[1]
        return found

    def updater(self, state: str) -> Place | None:
        """The node that makes the new value of a state."""
        return updater(self.graph, state)

    def _whole(self, value: Value, arrays: Sequence[Any]) -> Array:
        return read_layout(value.sharding, value.type, self._ranks).assemble(arrays)


class Weights:
    """Parameters of a graph by full name, as interpreters want them: in the dtypes that the graph says, made by its weight graph
    where weights are lifted."""

    def __init__(self, graph: Graph, source: TensorSource) -> None:
        self._source = source
        self._found: dict[str, Any] = {}
        self._makers: dict[str, Callable[[], Any]] = {}
        for instance in graph.instances():
            for value in instance.graph.params:
                self._makers[instance.prefix + value.name] = partial(self._make, instance.graph, value, instance.prefix)

    def __call__(self, name: str) -> Any:
        """The parameter with this full name."""
        if name not in self._found:
            self._found[name] = self._makers[name]()
        return self._found[name]

    def _make(self, graph: Graph, value: Value, prefix: str) -> Any:
        if graph.weights is not None:
            made = materialise(graph.weights, graph.weights.output(value.name), prefix, self._source, ())
            return made if isinstance(made, QuantizedArray) else np.asarray(made)
        name, form = prefix + value.name, value.type.dtype
        stored = self._source.read(name)
        if isinstance(form, QuantType):
            return QuantizedArray(stored, self._source.read(name + SCALE_SUFFIX), form, value.type.static_shape())
        return np.asarray(stored).astype(form.numpy)


def zero_states(graph: Graph, batch: int) -> dict[str, Array]:
    """Every state of ``graph`` at the start of a text, by full name."""
    sizes = {"batch": batch, "past": 0}
    types = {name: state.value.type.substitute(sizes) for name, state in graph.all_states().items()}
    return {name: np.zeros(type_.static_shape(), type_.plain_dtype.numpy) for name, type_ in types.items()}


def step_inputs(graph: Graph, ids: Array, past: int) -> dict[str, Array]:
    """The inputs of a model's graph for new tokens ``[batch, n]`` after ``past`` others, without padding."""
    batch, count = ids.shape
    given = {
        "token_ids": ids,
        "positions": positions(None, batch, past, count),
        "valid": np.ones((batch, past + count), bool),
    }
    return {value.name: given[value.name] for value in graph.inputs}
