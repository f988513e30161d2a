"""What a model takes of memory: weights, states and working memory, as planned from types alone, and as it really is.

A weight is *mapped* where it is a stored tensor as it lies in its file: its pages are the file's, and the system can drop them. All
other weights are *held*: made at load. On a device other than the CPU everything is held there. With a mesh, all figures are of one
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.lifetimes import last_uses
from deltaloom.graph.types import QuantType
from deltaloom.passes.cost import node_work
from deltaloom.passes.emit import Program, WeightSlot
from deltaloom.passes.kernel import Backend
from deltaloom.passes.memory import MemoryNeeds, MemoryPlan, returned
from deltaloom.runtime.state import prompt_room, room
from deltaloom.runtime.weights import narrows

StoredDType = Callable[[str], np.dtype[np.generic]]
"""The dtype of a checkpoint's tensor by its full name."""


@dataclass(frozen=True)
class Held:
    """Bytes of buffers at run time: where each lies in an arena and for how long it is used. ``first`` and ``last`` are the nodes
    of its function between which its content is needed, as numbers."""

    function: str
    node: str
    kind: str
    offset: int
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Working:
    """The working memory of one program. ``planned``: whether it works in an arena of ``nbytes``; otherwise every kernel allocates
    its results, and ``nbytes`` are those that exist at the same time at most, without what kernels take for themselves.
    ``unshared``: the bytes if none were used twice. ``scratch``: of the largest kernel's temporaries in the arena."""

    title: str
    planned: bool
    nbytes: int
    unshared: int
    scratch: int
    buffers: tuple[Held, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Footprint:
    """Bytes for ``batch`` sequences of ``context`` tokens each, on one of ``ranks``. ``held``, ``mapped``: weights; ``fixed``:
    states of one size; ``token``: keys and values of one token of all sequences, ``room``: how many tokens buffers then hold."""

    ranks: int
    batch: int
    context: int
    room: int
    held: int
    mapped: int
    fixed: int
    token: int
    working: tuple[Working, ...]

    @property
    def filled(self) -> int:
        """Of keys and values: ``token`` bytes for each token of context of all sequences."""
        return self.context * self.token

    @property
    def states(self) -> int:
        """Fixed states, and the buffers of keys and values with their spare room."""
        return self.fixed + self.room * self.token

    @property
    def total(self) -> int:
        """Everything that is held, the working memory of all programs together included."""
        return self.held + self.states + sum(one.nbytes for one in self.working)


def footprint(
    programs: Mapping[str, Program],
    home: Backend,
    *,
    batch: int,
    context: int,
    tokens: int,
    stored: StoredDType | None = None,
    ranks: int = 1,
) -> Footprint:
    """What ``programs`` (by title) of one model take together. ``context``: tokens of each sequence's prompt, in prefill steps of
    ``tokens``; ``stored``: of the checkpoint, without which no weight counts as mapped. ``RequestError`` for impossible sizes."""
    for name, value, least in (("batch", batch, 1), ("context", context, 0), ("tokens", tokens, 1)):
        require(value >= least, f"{name} is {value}, expected at least {least}", RequestError)
    held, mapped = weight_bytes(programs.values(), stored if home.device == "cpu" else None)
    graph = next(iter(programs.values())).graph
    capacity = grown_room(context, tokens)
    fixed = token = 0
    for name, state in graph.all_states().items():
        type_ = state.value.type.substitute({"batch": batch, "past": 1})
        fixed += 0 if state.append_axis is not None else _number(type_.nbytes(), name)
        token += _number(type_.nbytes(), name) if state.append_axis is not None else 0
    sizes = {"batch": batch, "past": capacity, "seq": min(tokens, max(context, 1))}
    working = tuple(working_memory(title, program, sizes) for title, program in programs.items())
    return Footprint(ranks, batch, context, capacity if token else 0, held, mapped, fixed, token, working)


def grown_room(context: int, chunk: int) -> int:
    """Tokens that append states have room for once a prompt of ``context``, in steps of ``chunk``, and one more are in them."""
    return room(room(0, prompt_room(context, chunk)), context + 1)


def weight_bytes(programs: Iterable[Program], stored: StoredDType | None) -> tuple[int, int]:
    """Bytes of the weights that are held and of those that are mapped; a weight that programs share counts once."""
    seen: dict[tuple[str, str, tuple[int, ...], str], None] = {}
    held = mapped = 0
    for program in programs:
        for instance in program.graph.instances():
            for slot in program.signatures[program.function(instance.graph)].weights:
                key = (instance.prefix + slot.value.name, slot.backend, slot.axes, str(slot.value.type.dtype))
                if key in seen:
                    continue
                seen[key] = None
                size = _number(slot.value.type.nbytes(), key[0])
                if stored is not None and is_mapped(instance.graph, slot, instance.prefix, stored):
                    mapped += size
                else:
                    held += size
    return held, mapped


def is_mapped(graph: Graph, slot: WeightSlot, prefix: str, stored: StoredDType) -> bool:
    """Whether a weight is a stored tensor, or a run of its rows, as it lies in the file."""
    if slot.axes or graph.weights is None:
        return False
    value = graph.weights.output(slot.value.name)
    while value.kind != "param":
        node = graph.weights.producers[value.name]
        rows = node.op.name == "split" and node.op.attributes()["axis"] == 0
        if node.op.name != "reshape" and not rows and not narrows(node):
            return False
        value = node.inputs[0]
    dtype = value.type.dtype
    return isinstance(dtype, QuantType) or stored(prefix + value.name) == slot.value.type.plain_dtype.numpy


def working_memory(title: str, program: Program, sizes: Mapping[str, int]) -> Working:
    """The working memory of a program for ``sizes``. Planned memory is checked; ``CompileError`` if that fails."""
    if program.memory is None:
        return Working(title, False, live_bytes(program.graph, sizes), all_bytes(program.graph, sizes), 0)
    plan = program.plan({name: sizes[name] for name in ("batch", "past")})
    buffers = tuple(_buffers(program.memory, plan))
    scratch: dict[tuple[str, str], int] = {}
    for one in buffers:
        if one.kind == "scratch":
            scratch[one.function, one.node] = scratch.get((one.function, one.node), 0) + one.nbytes
    return Working(title, True, plan.nbytes, plan.unshared, max(scratch.values(), default=0), buffers)


def all_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of every value that kernels make in one run of a graph, views and states excepted."""
    nodes = (node for instance in graph.instances() for node in instance.graph.nodes if not isinstance(node.op, Call))
    return sum(sum(_made(node, sizes).values()) for node in nodes)


def live_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """The most bytes of values that exist at the same time while a graph runs: each from its node to its last use."""
    inside = {name: live_bytes(region, sizes) for name, region in graph.regions.items()}
    ends = last_uses(graph)
    exist: dict[Value, int] = {}
    most = 0
    for node in graph.nodes:
        called = inside[node.op.region] if isinstance(node.op, Call) else 0
        most = max(most, sum(exist.values()) + called)
        exist |= _made(node, sizes)
        most = max(most, sum(exist.values()))
        for value in ends.get(node.name, ()):
            exist.pop(value, None)
    return most


def _made(node: Node, sizes: Mapping[str, int]) -> dict[Value, int]:
    """The outputs that a node makes, and their bytes; none where it only looks at its input or gives states."""
    if not isinstance(node.op, Call) and node_work(node, sizes).bytes == 0:
        return {}
    return {value: _number(value.type.substitute(sizes).nbytes(), value.name) for value in returned(node)}


def _buffers(needs: MemoryNeeds, plan: MemoryPlan) -> Iterator[Held]:
    for name, part in needs.parts.items():
        function = name or needs.graph.name
        for need in sorted(part.needs, key=lambda need: (need.first, plan.places[name][need.key].offset)):
            place = plan.places[name][need.key]
            yield Held(function, need.key.node, need.key.kind, place.offset, place.nbytes, need.first, need.last)


def _number(size: Dim, name: str) -> int:
    require(isinstance(size, int), f"the bytes of '{name}' are {size}, which is no number")
    return int(size)  # type: ignore[arg-type]
