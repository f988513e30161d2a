"""Why a value parts: the first node of a run whose kernel does not compute what its op means, or a value that was written over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.passes.emit import returned_values
from deltaloom.passes.kernel import Appended, Backend, Tensor
from deltaloom.passes.segment import TRANSFER
from deltaloom.runtime.model import Model
from deltaloom.runtime.node_check import Difference, NodeCall, made_outputs, typed_inputs, unfold
from deltaloom.runtime.sides import ProgramSide

CauseKind = Literal["kernel", "overwritten", "weight", "ranks", "choice", "graph"]


@dataclass(frozen=True)
class Cause:
    """What is wrong: a kernel's node, a value that was written over, a weight, a sharding string, a choice that turned on
    rounding, or (``graph``) none of these, so that the graph itself means something else. ``side`` has it, ``name`` is the node or
    value."""

    kind: CauseKind
    side: str
    name: str
    sentence: str
    difference: Difference | None = None
    interior: str = ""
    """The first value inside a fused op that parts, and how far; or that only the fused kernel is wrong."""
    call: NodeCall | None = None
    """The innermost node that is wrong, with what it got, to run again."""


class _Enough(Exception):
    """The node that was asked for has run."""


def fault_of(model: Model, title: str, chunks: Sequence[Array], last: str | None) -> Cause | None:
    """Run a model again over ``chunks`` of token ids and check each node of the last chunk against its op's definition, until the
    value ``last`` is made (None: to the end). None if nothing is wrong."""
    side = ProgramSide(title, model, chunks[0].shape[0])
    for ids in chunks[:-1]:
        side.step(ids)
    watch = _Watch(side, last)
    try:
        side.step(chunks[-1], watch.arguments, watch.done)
    except _Enough:
        pass
    return watch.found


class _Watch:
    """Looks at every node of a run."""

    def __init__(self, side: ProgramSide, last: str | None) -> None:
        self.found: Cause | None = None
        self._side = side
        self._last = last
        self._arguments: Sequence[Any] = ()
        self._inputs: tuple[Array | QuantizedArray, ...] = ()
        self._made: dict[int, tuple[str, Tensor, Array, Backend]] = {}
        self._changed: dict[int, str] = {}

    def arguments(self, name: str, node: Node, arguments: Sequence[Any]) -> None:
        """A node is about to run."""
        backend = self._backend(node)
        for argument in arguments:
            key = id(argument)
            if self.found is None and key in self._made and key in self._changed and not isinstance(argument, Appended):
                self._written_over(name, key)
        self._arguments = arguments
        self._inputs = () if node.op.name == TRANSFER else typed_inputs(node, arguments, backend)

    def done(self, name: str, node: Node, outputs: Sequence[Tensor], seconds: float) -> None:
        """A node ran."""
        backend = self._backend(node)
        for key, (_, tensor, copy, owner) in self._made.items():
            if key not in self._changed and not np.array_equal(owner.to_host(tensor), copy, equal_nan=True):
                self._changed[key] = name
        if self.found is None and node.op.name != TRANSFER:
            made = made_outputs(node, self._arguments, outputs, self._inputs, backend)
            kernel = node.placement.kernel if node.placement else ""
            self._check(name, NodeCall(node, self._inputs, made, kernel), backend)
        scope = name.removesuffix(node.name)
        for value, tensor in zip(returned_values(node), outputs, strict=True):
            array = backend.to_host(tensor)
            if not isinstance(array, QuantizedArray):
                self._made[id(tensor)] = (scope + value.name, tensor, np.array(array), backend)
                self._changed.pop(id(tensor), None)
        if self.found is not None or self._last in {scope + value.name for value in node.outputs}:
            raise _Enough

    def _check(self, name: str, call: NodeCall, backend: Backend) -> None:
        faults = call.faults()
        if not faults:
            return
        node = call.node
        output, difference = next(iter(faults.items()))
        sentence = (
            f"the kernel {call.kernel} does not compute what {node.op.name} means: given the same inputs, "
            f"%{output} is off by {difference}"
        )
        interior, inner = _interior(call, backend)
        self.found = Cause("kernel", self._side.title, name, sentence, difference, interior, inner)

    def _written_over(self, name: str, key: int) -> None:
        value, tensor, copy, owner = self._made[key]
        now = owner.to_host(tensor)
        count = int(np.count_nonzero(now != copy))
        sentence = (
            f"%{value} was right when it was made, but {self._changed[key]} wrote over {count} of its {copy.size} elements before "
            f"{name} read it: their buffers overlap"
        )
        self.found = Cause("overwritten", self._side.title, value, sentence)

    def _backend(self, node: Node) -> Backend:
        ctx = self._side.model.ctx
        return ctx.backends[0] if node.placement is None else ctx.backend(node.placement.backend)


def _interior(call: NodeCall, backend: Backend) -> tuple[str, NodeCall]:
    """Which part of a fused op is wrong, and the innermost node that is."""
    parted = unfold(call.node, call.inputs, backend)
    if parted is None:
        whole = call.node.op.decompose is not None
        alone = "every part of its decomposition is right on this backend, so only the fused kernel is wrong"
        return alone if whole else "", call
    graph, part, output = parted
    found = part.faults()[output]
    text = f"of its {len(graph.nodes)} parts the first that parts is {output} = {part.node.op.name} on {part.kernel}: {found}"
    return text, part
