"""The checker of memory plans: it runs after every planning and shares no reasoning about lifetimes with the planner.

It walks through each function as it will run and keeps a record of which buffers still hold what was written to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deltaloom.graph.errors import CompileError, require
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.passes.memory import ALIGNMENT, Key, MemoryNeeds, MemoryPlan, Place, returned


def check_plan(needs: MemoryNeeds, plan: MemoryPlan) -> None:
    """Raise ``CompileError`` unless every buffer has its bytes inside the arena, aligned; nothing is written over what is still
    read, or over what the same node reads or writes; and no result or new state lies in the arena."""
    for name, places in plan.places.items():
        for key, place in places.items():
            _check_bounds(f"the buffer {key} of '{name or needs.graph.name}'", place, plan.nbytes)
    retained: dict[str, set[int]] = {}
    for name, region in needs.graph.regions.items():
        retained[name] = _check_function(name, region, needs, plan, retained)
    _check_function("", needs.graph, needs, plan, retained)


def _check_bounds(what: str, place: Place, nbytes: int) -> None:
    start, stop, size = place.offset, place.offset + place.nbytes, place.type.nbytes()
    require(0 <= start and stop <= nbytes, f"{what} has bytes {start} to {stop} of an arena of {nbytes}", CompileError)
    require(start % ALIGNMENT == 0, f"{what} starts at byte {start}, expected a multiple of {ALIGNMENT}", CompileError)
    require(
        isinstance(size, int) and size <= place.nbytes,
        f"{what} has {place.nbytes} bytes for a {place.type}, which takes {size}",
        CompileError,
    )


def _check_function(name: str, graph: Graph, needs: MemoryNeeds, plan: MemoryPlan, retained: Mapping[str, set[int]]) -> set[int]:
    """Walk through one function. ``lies``: the buffers and inputs that a value may lie in; ``spoilt``: buffers since written over,
    by whom. Gives the numbers of the inputs that its states may lie in afterwards; ``retained``: those of the regions."""
    places, part = plan.places[name], needs.parts[name]
    given = {key for slot in part.slots for key in slot.keys}
    lies = {value: frozenset({Key(value.name, "input", number)}) for number, value in enumerate(graph.inputs)}
    leaving = list(graph.results)
    spoilt: dict[Key, str] = {}
    known: set[Key] = set()
    for node in graph.nodes:
        title = f"%{node.name} of '{graph.name}'"
        called = isinstance(node.op, Call)
        wanted = {key for key in given if key.node == node.name and key not in part.handed}
        mine = {key: place for key, place in places.items() if key.node == node.name}
        require(called or mine.keys() == wanted, f"{title} has the buffers {sorted(mine)}, needs {sorted(wanted)}", CompileError)
        known |= mine.keys()
        reads = frozenset[Key]().union(*(lies.get(value, frozenset()) for value in node.inputs))
        for key in sorted(reads & spoilt.keys()):
            raise CompileError(f"{title} reads {key}, whose bytes {spoilt[key]} has written over: the memory plan is wrong")
        inner = plan.places[node.op.region] if isinstance(node.op, Call) else {}
        leaving += [node.inputs[number] for number in sorted(retained[node.op.region])] if isinstance(node.op, Call) else []
        _check_apart(title, list(mine.values()), inner.values(), [places[key] for key in sorted(reads) if key in places])
        for key, place in places.items():
            if any(place.overlaps(other) for other in (*mine.values(), *inner.values())):
                spoilt[key] = title
        for key in mine:
            spoilt.pop(key, None)
        lies |= _lies_after(node, reads, mine, needs)
    strange = sorted(places.keys() - known)
    require(not strange, f"'{graph.name}' has places for {strange}, which no node has", CompileError)
    for value in leaving:
        inside = sorted(key for key in lies.get(value, ()) if key in places)
        message = f"{value} leaves '{graph.name}' but lies in its {inside}, which the next run writes over"
        require(not inside, message, CompileError)
    states = [value for _, value in graph.updates]
    return {key.number for value in states for key in lies.get(value, ()) if key.kind == "input"}


def _check_apart(title: str, mine: list[Place], inner: Iterable[Place], read: list[Place]) -> None:
    """What a node writes shares no byte with what it reads, nor one buffer with another; a call writes its region's as well."""
    for number, place in enumerate(mine):
        others = [*mine[number + 1 :], *inner, *read]
        require(not any(map(place.overlaps, others)), f"{title} writes bytes {place} that it uses otherwise too", CompileError)
    for place in inner:
        require(not any(map(place.overlaps, read)), f"{title} writes bytes {place} that it reads", CompileError)


def _lies_after(node: Node, reads: frozenset[Key], mine: Mapping[Key, Place], needs: MemoryNeeds) -> dict[Value, frozenset[Key]]:
    """Where the outputs of a node may lie: in their buffers, in memory of their own, or, as views may, wherever its inputs do."""
    own = frozenset(key for key in mine if key.kind == "out")
    if isinstance(node.op, Call):
        handed = set(needs.parts[node.op.region].handed.values())
        found = dict.fromkeys(node.outputs, reads | own)
        return found | {node.outputs[index]: own & {Key(node.name, "out", index)} for index in handed}
    kernel = needs.kernels(node)
    found = dict.fromkeys(node.outputs, frozenset[Key]())
    for index, value in enumerate(returned(node)):
        into = kernel is not None and kernel.into
        found[value] = own & {Key(node.name, "out", index)} if into else reads
    return found
