"""Memory plan: which bytes of one block (the arena) every buffer of a program gets, so that a step allocates nothing.

Planned are the outputs of kernels that write ``into`` buffers and the ``scratch`` of kernels (passes/kernel.py). Any other
kernel may return views, so its outputs are taken to lie in the buffers of all its inputs, which keep their bytes while one of the
outputs is read. What a caller keeps (results, new states) never lies in the arena: its kernel allocates it.

The regions of a program run one after the other and share the first bytes of the arena, as temporaries of the calls. An output of
a region lies in a buffer that its caller hands in. ``memory_needs`` reads from the graph who needs a buffer and for how long,
``plan_memory`` gives each its bytes for known sizes, and ``memory_check.check_plan`` checks that without believing either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.types import TensorType
from deltaloom.passes.kernel import Backend, Kernel, PlansMemory, kernels_for

ALIGNMENT = 64
"""Bytes of a cache line; every buffer starts at a multiple."""

SIZES = ("batch", "past")
"""The symbols that are known when a program runs: a state's rows, and the entries that its buffers have room for."""

Kernels = Callable[[Node], Kernel | None]
"""The kernel of a node, or None for a call, a transfer and a node of a backend that cannot be given buffers."""

Kind = Literal["out", "scratch", "input"]


class Key(NamedTuple):
    """A buffer of a graph's function: the ``number``-th that the node gets as ``out`` or ``scratch`` (a call: its outputs); or an
    input of the function, which its caller has a place for."""

    node: str
    kind: Kind
    number: int


class Slot(NamedTuple):
    """A buffer argument of one kernel call; ``types`` are those of its buffers."""

    node: str
    kind: Kind
    types: tuple[TensorType, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The buffers, in order."""
        return tuple(Key(self.node, self.kind, index) for index in range(len(self.types)))


class Need(NamedTuple):
    """A buffer and the numbers of the first and the last node during which its bytes are its own."""

    key: Key
    type: TensorType
    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """What one graph's function needs: the buffer arguments of its kernel calls, the buffers to plan, the outputs that it writes
    into its caller's buffers, as the key here -> the number of the output, and the inputs (by number) that it keeps as a state."""

    slots: tuple[Slot, ...]
    needs: tuple[Need, ...]
    handed: Mapping[Key, int]
    retained: frozenset[int]


@dataclass(frozen=True)
class MemoryNeeds:
    """What a placed program needs, by graph name ("" is the top level), whatever its sizes are."""

    graph: Graph
    kernels: Kernels
    parts: Mapping[str, Part]


class Place(NamedTuple):
    """Bytes ``offset`` to ``offset + nbytes`` of the arena, for a buffer of a type without symbols."""

    type: TensorType
    offset: int
    nbytes: int

    def overlaps(self, other: Place) -> bool:
        """Whether both have a byte in common."""
        return self.offset < other.offset + other.nbytes and other.offset < self.offset + self.nbytes


@dataclass(frozen=True)
class MemoryPlan:
    """The arena of a program for one set of sizes. ``unshared``: bytes if no two buffers shared any."""

    sizes: Mapping[str, int]
    places: Mapping[str, Mapping[Key, Place]]
    nbytes: int
    unshared: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        count = sum(map(len, self.places.values()))
        return f"{self.nbytes:,} bytes for {count} buffers at {sizes} ({self.unshared:,} without reuse)"


def buffered_kernels(home: Backend) -> Kernels:
    """The kernels of nodes on ``home``, if it can give its kernels buffers; None for every node otherwise."""
    plans = isinstance(home, PlansMemory) and not home.compiles
    found: dict[str, dict[str, Kernel]] = {}

    def kernel_of(node: Node) -> Kernel | None:
        place, op = node.placement, node.op.name
        if not plans or place is None or place.backend != home.name:
            return None
        if op not in found:
            found[op] = {kernel.name: kernel for kernel in reversed(kernels_for(home, op))}
        return found[op].get(place.kernel)

    return kernel_of


def memory_needs(graph: Graph, kernels: Kernels) -> MemoryNeeds | None:
    """The needs of a placed program, or None where it has none or has sizes that are only known from its inputs."""
    if not graph.symbols().keys() <= set(SIZES):
        return None
    parts: dict[str, Part] = {}
    for name, region in graph.regions.items():
        parts[name] = _part(region, kernels, parts, top=False)
    parts[""] = _part(graph, kernels, parts, top=True)
    return MemoryNeeds(graph, kernels, parts) if any(part.slots for part in parts.values()) else None


def plan_memory(needs: MemoryNeeds, sizes: Mapping[str, int]) -> MemoryPlan:
    """Bytes for every buffer, where ``sizes`` gives all symbols. Raises ``GraphError`` for a size that is missing."""
    places: dict[str, Mapping[Key, Place]] = {}
    shared = unshared = 0
    for name in needs.graph.regions:
        places[name], end = _place(needs.parts[name].needs, sizes, start=0)
        shared = max(shared, end)
    places[""], end = _place(needs.parts[""].needs, sizes, start=shared)
    unshared = sum(place.nbytes for part in places.values() for place in part.values())
    return MemoryPlan(dict(sizes), places, end, unshared)


def returned(node: Node) -> tuple[Value, ...]:
    """The outputs of a node that are no states: those that an ``into`` kernel writes into buffers, in order."""
    states = set(node.op.updates.values())
    return tuple(value for index, value in enumerate(node.outputs) if index not in states)


def _part(graph: Graph, kernels: Kernels, regions: Mapping[str, Part], *, top: bool) -> Part:
    written = {node.name: _written(node, kernels, regions) for node in graph.nodes}
    lies = _lies_in(graph, written)
    states = _lie_in_states(graph, lies, regions)
    kept, handed = _kept_and_handed(graph, written, lies, states, top=top)
    numbers = {node.name: number for number, node in enumerate(graph.nodes)}
    last = {value: numbers[node] for node, own in written.items() for value in own.values()}
    for node in graph.nodes:
        for value in node.inputs:
            last.update(dict.fromkeys(lies.get(value, ()), numbers[node.name]))
    slots: list[Slot] = []
    needs: list[Need] = []
    outputs: dict[Key, int] = {}
    for number, node in enumerate(graph.nodes):
        outs = {Key(node.name, "out", index): value for index, value in written[node.name].items() if value not in kept}
        outputs |= {key: handed[value] for key, value in outs.items() if value in handed}
        needs += [Need(key, value.type, number, last[value]) for key, value in outs.items() if value not in handed]
        kernel = kernels(node)
        if kernel is None:
            continue
        if outs:
            slots.append(Slot(node.name, "out", tuple(value.type for value in outs.values())))
        scratch = kernel.scratch(node) if kernel.scratch is not None else ()
        if scratch:
            slots.append(Slot(node.name, "scratch", scratch))
            needs += [Need(key, type_, number, number) for key, type_ in zip(slots[-1].keys, scratch, strict=True)]
    retained = frozenset(number for number, value in enumerate(graph.inputs) if value in states)
    return Part(tuple(slots), tuple(needs), outputs, retained)


def _written(node: Node, kernels: Kernels, regions: Mapping[str, Part]) -> dict[int, Value]:
    """The outputs that go into buffers from outside the kernel (or region), by their index in ``out`` (or among the outputs)."""
    if isinstance(node.op, Call):
        return {index: node.outputs[index] for index in sorted(regions[node.op.region].handed.values())}
    kernel = kernels(node)
    return dict(enumerate(returned(node))) if kernel is not None and kernel.into else {}


def _lies_in(graph: Graph, written: Mapping[str, Mapping[int, Value]]) -> dict[Value, frozenset[Value]]:
    """Value -> the inputs and the written values in whose buffers it may lie: itself, or what it may be a view of. A new state that
    a kernel returns lies in none."""
    found = {value: frozenset({value}) for value in graph.inputs}
    for node in graph.nodes:
        own = frozenset(written[node.name].values())
        views = own.union(*(found.get(value, frozenset()) for value in node.inputs))
        plain = returned(node)
        for value in node.outputs:
            found[value] = frozenset({value}) if value in own else views if value in plain else frozenset()
    return found


def _lie_in_states(graph: Graph, lies: Mapping[Value, frozenset[Value]], regions: Mapping[str, Part]) -> set[Value]:
    """The inputs and written values in whose buffers a state may lie after the run: one of the graph or of a region it calls."""
    last = [value for _, value in graph.updates]
    for node in graph.nodes:
        if isinstance(node.op, Call):
            last += [node.inputs[number] for number in sorted(regions[node.op.region].retained)]
    return {one for value in last for one in lies.get(value, ())}


def _kept_and_handed(
    graph: Graph,
    written: Mapping[str, Mapping[int, Value]],
    lies: Mapping[Value, frozenset[Value]],
    states: set[Value],
    *,
    top: bool,
) -> tuple[set[Value], dict[Value, int]]:
    """The written values that must not lie in the arena, since a caller keeps them or a view of them; and those that a region's
    caller has buffers for, with the number of the output. A kernel gets buffers for all of its outputs or for none."""
    results = [value for _, value in graph.outputs]
    ways = Counter(results)
    buffers = {value for own in written.values() for value in own.values() if ways[value] == 1 and not top}
    kept: set[Value] = set()
    while True:
        handed = {value: number for number, value in enumerate(results) if value in buffers and value not in kept}
        escaping = states.union(*(lies.get(value, frozenset()) - handed.keys() for value in results))
        for node in graph.nodes:
            own = set(written[node.name].values())
            if own & escaping:
                escaping |= set() if isinstance(node.op, Call) else own
        if escaping <= kept:
            return kept, handed
        kept |= escaping


def _place(needs: Sequence[Need], sizes: Mapping[str, int], *, start: int) -> tuple[dict[Key, Place], int]:
    """Places from ``start`` on, and their end: in the order of first use, each in the smallest gap that it fits in."""
    types = {need.key: need.type.substitute(sizes) for need in needs}
    lengths = {key: _aligned(_nbytes(type_)) for key, type_ in types.items()}
    found: dict[Key, Place] = {}
    open_: list[tuple[int, int, int]] = []  # last use, offset, bytes
    gaps: list[tuple[int, int]] = []  # offset, bytes
    end = start
    for need in sorted(needs, key=lambda need: (need.first, -lengths[need.key], need.key)):
        while open_ and open_[0][0] < need.first:
            _, offset, nbytes = heappop(open_)
            gaps = _joined([*gaps, (offset, nbytes)])
        length = lengths[need.key]
        fitting = [gap for gap in gaps if gap[1] >= length]
        if fitting:
            offset, room = min(fitting, key=lambda gap: (gap[1], gap[0]))
            gaps.remove((offset, room))
        elif gaps and sum(gaps[-1]) == end:
            offset, room = gaps.pop()
        else:
            offset, room = end, length
        if room > length:
            gaps = _joined([*gaps, (offset + length, room - length)])
        end = max(end, offset + length)
        heappush(open_, (need.last, offset, length))
        found[need.key] = Place(types[need.key], offset, length)
    return found, end


def _joined(gaps: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Gaps in order, neighbours made one, empty ones left out."""
    found: list[tuple[int, int]] = []
    for offset, nbytes in sorted(gap for gap in gaps if gap[1]):
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + nbytes)
        else:
            found.append((offset, nbytes))
    return found


def _nbytes(type_: TensorType) -> int:
    total = type_.plain_dtype.itemsize
    for size in type_.static_shape():
        total *= size
    return total


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
