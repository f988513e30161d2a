"""Arenas: the blocks of memory in which programs with a memory plan work, kept from step to step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Call
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Backend, PlansMemory, Tensor
from deltaloom.passes.memory import Key, MemoryPlan, Place, Slot

KEPT = 8
"""Arenas that are kept while nobody uses them."""

Buffers = dict[str, tuple[Any, ...]]
"""By call prefix, an entry for every ``out=`` and ``scratch=`` of the function: a tensor, a tuple of them, or None."""


@dataclass(frozen=True)
class Arena:
    """A block of memory and the buffers of one program in it, made once; ``key`` says for which program and sizes."""

    key: Hashable
    memory: Tensor
    plan: MemoryPlan
    buffers: Buffers


class Arenas:
    """The arenas of an executor that nobody uses. A run takes one and gives it back, so two threads never work in the same; after
    a run that failed it is not given back, since a thread of the pool may still be writing."""

    def __init__(self, home: Backend) -> None:
        self._home = home
        self._idle: list[Arena] = []
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas that nobody uses now."""
        with self._lock:
            return sum(arena.plan.nbytes for arena in self._idle)

    def take(self, program: Program, key: Hashable, sizes: Mapping[str, int]) -> Arena:
        """An arena for ``program`` at ``sizes``, which ``key`` together with the sizes stands for; its content is arbitrary."""
        full = (key, *sizes.items())
        with self._lock:
            for number in range(len(self._idle) - 1, -1, -1):
                if self._idle[number].key == full:
                    return self._idle.pop(number)
        return make_arena(program, self._home, full, sizes)

    def give(self, arena: Arena) -> None:
        """Take ``arena`` back; of those that are idle the longest goes when there are too many."""
        with self._lock:
            self._idle.append(arena)
            del self._idle[:-KEPT]


def make_arena(program: Program, home: Backend, key: Hashable, sizes: Mapping[str, int]) -> Arena:
    """Plan, check and allocate the memory of a program that takes buffers."""
    if not isinstance(home, PlansMemory):
        found = f"program '{program.graph.name}' takes buffers, but backend '{home.name}' makes none"
        raise CompileError(f"{found}; run it on the backend that it was compiled for")
    plan = program.plan(sizes)
    memory = home.arena(plan.nbytes)
    tensors: dict[Place, Tensor] = {}

    def tensor(place: Place) -> Tensor:
        if place not in tensors:
            tensors[place] = home.part(memory, place.offset, place.type.static_shape(), place.type.plain_dtype)
        return tensors[place]

    def entry(slot: Slot, places: Mapping[Key, Place]) -> Any:
        if any(key not in places for key in slot.keys):
            return None  # the caller keeps an output
        found = tuple(tensor(places[key]) for key in slot.keys)
        return found[0] if slot.kind == "out" and len(found) == 1 else found

    buffers: Buffers = {}
    for prefix, name, places in _instances(program, plan):
        buffers[prefix] = tuple(entry(slot, places) for slot in program.signatures[name].buffers)
    return Arena(key, memory, plan, buffers)


def no_buffers(program: Program) -> Buffers:
    """Buffers with which every kernel of a program allocates."""
    return {prefix: (None,) * len(signature.buffers) for prefix, signature in program.by_prefix().items()}


def _instances(program: Program, plan: MemoryPlan) -> Iterator[tuple[str, str, dict[Key, Place]]]:
    """Prefix, name and places of every function call: those of the function, and those that its caller has for its outputs."""
    assert program.memory is not None
    calls = {node.op.prefix: node.name for node in program.graph.nodes if isinstance(node.op, Call)}
    for instance in program.graph.instances():
        name = program.function(instance.graph)
        places = dict(plan.places[name])
        for key, number in program.memory.parts[name].handed.items():
            outside = plan.places[""].get(Key(calls[instance.prefix], "out", number))
            if outside is not None:
                places[key] = outside
        yield instance.prefix, name, places
