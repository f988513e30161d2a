"""Emit: placed graphs become straight-line Python that a person can read, paste into a file and step through.

Every region is one function ``region(inputs…, weights, fixed, append) -> (outputs, new fixed states)``; the top level is one more
that takes ``weights``, ``fixed`` and ``append`` as dictionaries by call prefix and leaves new fixed states in ``fixed``. Runs of
nodes for a backend that compiles (``torch.compile``) become functions of their own, which that backend finishes.

A program whose memory is planned (passes/memory.py) takes ``buffers`` as one more argument: for every call prefix a tuple with one
entry for each ``out=`` and ``scratch=`` of the function, in order. Where an entry is None, the kernel allocates. In any other
program a value is deleted after its last use, so that its memory is free for the next.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.lifetimes import last_uses
from deltaloom.graph.naming import free_name
from deltaloom.graph.types import TensorType
from deltaloom.passes.emit_names import Names, identifier
from deltaloom.passes.memory import Kind, MemoryNeeds, MemoryPlan, Slot, buffered_kernels, memory_needs, plan_memory
from deltaloom.passes.memory_check import check_plan
from deltaloom.passes.pipeline import Context
from deltaloom.passes.segment import TRANSFER, RunsSegments, Segment, runs


@dataclass(frozen=True)
class WeightSlot:
    """A weight that a graph's function gets: which, for which backend, in which axis order (() is as typed)."""

    value: Value
    backend: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class StateSlot:
    """A state that a graph's function gets: its name relative to the graph, type, owner, and append axis (None: fixed)."""

    name: str
    type: TensorType
    backend: str
    append_axis: int | None


@dataclass(frozen=True)
class Signature:
    """What one function takes besides its inputs, in order."""

    weights: tuple[WeightSlot, ...]
    fixed: tuple[StateSlot, ...]
    append: tuple[StateSlot, ...]
    buffers: tuple[Slot, ...] = ()


@dataclass(frozen=True)
class Program:
    """A compiled program: ``run(*inputs, weights, fixed, append)`` gives the outputs as a tuple in the order of ``outputs``. Where
    ``memory`` is not None, ``run`` takes ``buffers`` too."""

    graph: Graph
    source: str
    run: Callable[..., tuple[Any, ...]]
    outputs: tuple[str, ...]
    signatures: Mapping[str, Signature]
    memory: MemoryNeeds | None = None
    finished: tuple[tuple[str, str], ...] = ()
    """The emitted functions that a backend made ready, and that backend."""

    def function(self, graph: Graph) -> str:
        """The name of the top level ("") or a region in ``signatures``, ``memory`` and its plans."""
        return "" if graph is self.graph else graph.name

    def by_prefix(self) -> dict[str, Signature]:
        """The signature of the function that runs under each call prefix."""
        return {instance.prefix: self.signatures[self.function(instance.graph)] for instance in self.graph.instances()}

    def plan(self, sizes: Mapping[str, int]) -> MemoryPlan:
        """The checked memory plan for ``sizes``: ``batch``, and ``past``, the entries that append states have room for.
        ``CompileError`` if the check fails, or for a program that takes no buffers."""
        if self.memory is None:
            raise CompileError(f"program '{self.graph.name}' takes no buffers, so there is no memory to plan")
        plan = plan_memory(self.memory, sizes)
        check_plan(self.memory, plan)
        return plan


def emit(graph: Graph, ctx: Context, title: str) -> Program:
    """Source and function of a placed, segmented program. Raises ``CompileError`` for a node without placement."""
    names = Names()
    names.reserve(graph, ctx)
    memory = memory_needs(graph, buffered_kernels(ctx.backends[0]))
    signatures = {name: signature(region, ctx, memory, name) for name, region in graph.regions.items()}
    signatures[""] = signature(graph, ctx, memory)
    bodies: list[str] = []
    finished: list[Segment] = []
    for name, region in graph.regions.items():
        bodies += _function(region, signatures[name], signatures, names, finished, ctx, top=False)
    bodies += _function(graph, signatures[""], signatures, names, finished, ctx, top=True)
    header = names.header(f"{graph.name}, {title}", ctx)
    source = "\n".join([*header, *bodies])
    space = _execute(bodies, names, f"<deltaloom {graph.name} {title}>", source, skip=len(header))
    for segment in finished:
        owner = ctx.backend(segment.backend)
        if isinstance(owner, RunsSegments):
            space[segment.name] = owner.segment(segment)
        else:
            space[segment.name] = owner.finish(space[segment.name], segment.name)
    run = space[names.function(graph.name)]
    outputs = tuple(name for name, _ in graph.outputs)
    return Program(graph, source, run, outputs, signatures, memory, tuple((one.name, one.backend) for one in finished))


def _execute(bodies: Sequence[str], names: Names, file: str, source: str, *, skip: int) -> dict[str, Any]:
    """Define the functions over the very objects that the header would look up; tracebacks and debuggers show ``source``."""
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = dict(names.values)
    exec(compile("\n" * skip + "\n".join(bodies), file, "exec"), space)
    return space


def signature(graph: Graph, ctx: Context, memory: MemoryNeeds | None = None, name: str = "") -> Signature:
    """Weights and states of a graph's function: by first use, each once for every backend and layout that reads it; and what its
    part ``name`` of the planned memory has for it."""
    weights: dict[WeightSlot, None] = {}
    owners: dict[Value, str] = {}
    for node in graph.nodes:
        if node.placement is None:
            continue
        layouts = dict(node.placement.layouts)
        for position, value in enumerate(node.inputs):
            if value.kind == "param":
                weights.setdefault(WeightSlot(value, node.placement.backend, layouts.get(position, ())))
            elif value.kind == "state" and owners.setdefault(value, node.placement.backend) != node.placement.backend:
                both = f"{owners[value]} and on {node.placement.backend}"
                raise CompileError(f"state {value} is used on {both}; give one backend both ops")
    home = ctx.backends[0].name
    slots = [StateSlot(s.name, s.value.type, owners.get(s.value, home), s.append_axis) for s in graph.states]
    fixed = tuple(slot for slot in slots if slot.append_axis is None)
    buffers = () if memory is None else memory.parts[name].slots
    return Signature(tuple(weights), fixed, tuple(slot for slot in slots if slot.append_axis is not None), buffers)


class _Body:
    """The lines of one function and the Python names of the values in it."""

    def __init__(self, names: Names, arguments: Sequence[str] = ()) -> None:
        """``arguments``: what the function takes besides its inputs."""
        self.lines: list[str] = []
        self.local: dict[Value, str] = {}
        self.arguments = tuple(arguments)
        self._weights: dict[WeightSlot, str] = {}
        self._buffers: dict[tuple[str, Kind], str] = {}
        self._taken: set[str] = names.taken.union(arguments)

    def name(self, value: Value) -> str:
        """The Python name of a value, after the value's own."""
        if value not in self.local:
            self.local[value] = self._unique(identifier(value.name))
        return self.local[value]

    def weight(self, slot: WeightSlot) -> str:
        """The Python name of a weight in one layout on one backend."""
        if slot not in self._weights:
            self._weights[slot] = self._unique(identifier(f"w_{slot.value.name}"))
        return self._weights[slot]

    def new_buffers(self, slot: Slot) -> str:
        """The Python name of the buffers of one kernel call, after the node."""
        name = self._unique(identifier(f"{'m' if slot.kind == 'out' else 's'}_{slot.node}"))
        self._buffers[slot.node, slot.kind] = name
        return name

    def buffers(self, node: Node) -> list[str]:
        """The keyword arguments with which the kernel of ``node`` gets its buffers."""
        kinds: tuple[Kind, ...] = ("out", "scratch")
        return [f"{kind}={self._buffers[node.name, kind]}" for kind in kinds if (node.name, kind) in self._buffers]

    def _unique(self, base: str) -> str:
        found = free_name(base, self._taken)
        self._taken.add(found)
        return found

    def add(self, line: str) -> None:
        self.lines.append(f"    {line}")

    def delete(self, values: Sequence[Value]) -> None:
        """Drop those of ``values`` that have a name here."""
        found = [self.local[value] for value in values if value in self.local]
        if found:
            self.add(f"del {', '.join(found)}")


def _function(
    graph: Graph,
    signature: Signature,
    signatures: Mapping[str, Signature],
    names: Names,
    finished: list[Segment],
    ctx: Context,
    *,
    top: bool,
) -> list[str]:
    """The lines of the function of one graph, after those of the segment functions that it calls."""
    planned = any(one.buffers for one in signatures.values())
    body = _Body(names, ("weights", "fixed", "append", *(("buffers",) if planned else ())))
    for value in graph.inputs:
        body.name(value)
    own = '[""]' if top else ""
    _unpack(body, [body.weight(slot) for slot in signature.weights], f"weights{own}")
    states = {s.name: s.value for s in graph.states}
    _unpack(body, [body.name(states[slot.name]) for slot in signature.fixed], f"fixed{own}")
    _unpack(body, [body.name(states[slot.name]) for slot in signature.append], f"append{own}")
    _unpack(body, [body.new_buffers(slot) for slot in signature.buffers], f"buffers{own}")
    before: list[str] = []
    scope = ""
    ends = {} if planned else last_uses(graph)
    for number, (backend, nodes) in enumerate(runs(graph)):
        if backend is not None and ctx.backend(backend).compiles:
            title = names.segment(graph, number)
            lines, segment = _segment(title, backend, graph, nodes, body, names, ctx, ends)
            finished.append(segment)
            before += lines
            body.delete([value for node in nodes for value in ends.get(node.name, ())])
            continue
        for node in nodes:
            if node.scope != scope:
                scope = node.scope
                body.add(f"# {scope or graph.name}")
            _node(body, node, graph, signatures, names, ctx)
            body.delete(ends.get(node.name, ()))
    updates = dict(graph.updates)
    new_fixed = [body.name(updates[slot.name]) for slot in signature.fixed]
    results = _tuple([body.name(value) for _, value in graph.outputs])
    if top:
        if new_fixed:
            body.add(f"fixed[''] = {_tuple(new_fixed)}")
        body.add(f"return {results}")
    else:
        body.add(f"return {results}, {_tuple(new_fixed)}")
    arguments = ", ".join([*(body.local[value] for value in graph.inputs), *body.arguments])
    return [*before, "", f"def {names.function(graph.name)}({arguments}):", *body.lines, ""]


def _node(body: _Body, node: Node, graph: Graph, signatures: Mapping[str, Signature], names: Names, ctx: Context) -> None:
    """One line for one node."""
    if isinstance(node.op, Call):
        prefix, region = node.op.prefix, node.op.region
        arguments = [body.name(v) for v in node.inputs]
        arguments += [f"{kind}[{prefix!r}]" for kind in body.arguments]
        target = f"{_tuple([body.name(v) for v in node.outputs])}, fixed[{prefix!r}]"
        body.add(f"{target} = {names.function(region)}({', '.join(arguments)})")
    elif node.op.name == TRANSFER:
        source, goal = (names.backend(str(node.op.attributes()[key]), ctx) for key in ("source", "target"))
        value = body.name(node.inputs[0])
        body.add(f"{body.name(node.outputs[0])} = {goal}.from_host({source}.to_host({value}))")
    else:
        targets = [body.name(value) for value in _returned(node, graph)]
        body.add(f"{', '.join(targets)} = {_kernel_call(body, node, names, ctx)}")


def _kernel_call(body: _Body, node: Node, names: Names, ctx: Context) -> str:
    if node.placement is None:
        raise CompileError(f"%{node.name} = {node.op} has no kernel; run the assign pass before emitting")
    layouts = dict(node.placement.layouts)
    arguments = [names.op(node.op)]
    for position, value in enumerate(node.inputs):
        if value.kind == "param":
            arguments.append(body.weight(WeightSlot(value, node.placement.backend, layouts.get(position, ()))))
        else:
            arguments.append(body.name(value))
    return f"{names.kernel(node, ctx)}({', '.join([*arguments, *body.buffers(node)])})"


def returned_values(node: Node) -> list[Value]:
    """The outputs that a kernel returns: all but the append states, which it extends in place."""
    appended = {node.op.updates[name] for name in node.op.appends}
    return [value for index, value in enumerate(node.outputs) if index not in appended]


def _returned(node: Node, graph: Graph) -> list[Value]:
    """What the kernel of a node of ``graph`` returns."""
    found, updated = returned_values(node), {value for _, value in graph.updates}
    for value in node.outputs:
        if value not in found and (graph.users.get(value) or value not in updated):
            raise CompileError(f"%{value.name} is an append state of %{node.name} and can only be a state's new value")
    return found


def _segment(
    title: str,
    backend: str,
    graph: Graph,
    nodes: Sequence[Node],
    outer: _Body,
    names: Names,
    ctx: Context,
    ends: Mapping[str, Sequence[Value]],
) -> tuple[list[str], Segment]:
    """A function for a run of nodes of one compiling backend, whose call is put into ``outer``."""
    inner = _Body(names)
    inputs: dict[str, str] = {}
    given: dict[str, Value] = {}
    made: set[Value] = set()
    for node in nodes:
        assert node.placement is not None
        layouts = dict(node.placement.layouts)
        for position, value in enumerate(node.inputs):
            if value.kind == "param":
                slot = WeightSlot(value, node.placement.backend, layouts.get(position, ()))
                inputs[inner.weight(slot)] = outer.weight(slot)
                given[inner.weight(slot)] = value
            elif value not in made:
                inputs[inner.name(value)] = outer.name(value)
                given[inner.name(value)] = value
        made.update(node.outputs)
    for node in nodes:
        targets = ", ".join(inner.name(value) for value in _returned(node, graph))
        inner.add(f"{targets} = {_kernel_call(inner, node, names, ctx)}")
        inner.delete([value for value in ends.get(node.name, ()) if value in made])
    mine = {node.name for node in nodes}
    later = {v for node in graph.nodes if node.name not in mine for v in node.inputs} | set(graph.results)
    results = [value for node in nodes for value in _returned(node, graph) if value in later]
    inner.add(f"return {_tuple([inner.name(value) for value in results])}")
    outer.add(f"{_tuple([outer.name(value) for value in results])} = {title}({', '.join(inputs.values())})")
    segment = Segment(title, backend, tuple(nodes), tuple(given.values()), tuple(results))
    return ["", f"def {title}({', '.join(inputs)}):", *inner.lines, ""], segment


def _unpack(body: _Body, targets: Sequence[str], source: str) -> None:
    if targets:
        body.add(f"{_tuple(targets)} = {source}")


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
