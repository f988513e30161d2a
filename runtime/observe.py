"""A program run node by node, so that each value can be looked at and each kernel timed: what the emitted code does, interpreted.

Every node runs on the kernel that it was placed on, with the same weights, states and buffers. Only segments that a backend would
compile as one function run as the kernels that they consist of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Call, Graph, Node, Value
from deltaloom.graph.op import Array
from deltaloom.passes.emit import Program, WeightSlot, returned_values
from deltaloom.passes.kernel import RunsAlone, Tensor, find_kernel
from deltaloom.passes.pipeline import Context
from deltaloom.passes.segment import TRANSFER

if TYPE_CHECKING:
    from deltaloom.runtime.executor import Executor
    from deltaloom.runtime.state import ModelState

OnNode = Callable[[str, Node, Sequence[Tensor], float], None]
"""Full name of the node (``layers.3.x.sum``), the node, what its kernel returned (``emit.returned_values``), and its seconds.
Later nodes may write over the tensors."""
OnArguments = Callable[[str, Node, Sequence[Any]], None]
"""Full name of a node that is about to run, the node, and what its kernel will get: weights in the layout that it wants, append
states as ``Appended``. The kernel may write over states."""

Changed = Callable[[Node, Sequence[Any], tuple[Tensor, ...]], tuple[Tensor, ...]]
"""A node, what its kernel got and what it returned; gives what later nodes get."""


def observe(
    executor: Executor,
    inputs: Mapping[str, Array],
    state: ModelState,
    new_valid: Array | None,
    outputs: tuple[str, ...],
    on_node: OnNode,
    on_arguments: OnArguments | None = None,
) -> dict[str, Array]:
    """``Executor.run``, node by node: advances ``state``, gives the outputs, and calls ``on_arguments`` before and ``on_node``
    after every node in order."""

    def run(program: Program, *arguments: Any) -> tuple[Tensor, ...]:
        return observe_program(program, executor.ctx, arguments, on_node, on_arguments)

    return executor.run(inputs, state, new_valid, outputs, through=run)


def observe_program(
    program: Program,
    ctx: Context,
    arguments: Sequence[Any],
    on_node: OnNode,
    on_arguments: OnArguments | None = None,
    *,
    changed: Changed | None = None,
) -> tuple[Tensor, ...]:
    """``Program.run`` on ``arguments``, node by node. What ``changed`` gives takes the place of what a kernel returned."""
    return _Interpreter(program, ctx, on_node, on_arguments, changed).run(*arguments)


def node_runner(ctx: Context, node: Node) -> Callable[..., Any]:
    """What runs a node by itself: its kernel with the op, or the two steps of a transfer."""
    if node.op.name == TRANSFER:
        source, target = (ctx.backend(str(node.op.attributes()[key])) for key in ("source", "target"))
        return lambda tensor: target.from_host(source.to_host(tensor))
    if node.placement is None:
        raise CompileError(f"%{node.name} = {node.op} has no kernel; only placed programs can be run")
    backend = ctx.backend(node.placement.backend)
    kernel = find_kernel(backend, node.op.name, node.placement.kernel)
    return partial(backend.alone(kernel) if isinstance(backend, RunsAlone) else kernel, node.op)


def full_name(prefix: str, node: Node) -> str:
    """The name of a node in the whole model: ``layers.3.x.sum``, whatever the checkpoint's names begin with."""
    return prefix.removeprefix("model.") + node.name


class _Interpreter:
    """One run of a program."""

    def __init__(
        self, program: Program, ctx: Context, on_node: OnNode, on_arguments: OnArguments | None, changed: Changed | None
    ) -> None:
        self._program = program
        self._ctx = ctx
        self._on_node = on_node
        self._on_arguments = on_arguments
        self._changed = changed
        self._kernels: dict[int, Callable[..., Any]] = {}

    def run(self, *arguments: Any) -> tuple[Tensor, ...]:
        """As ``Program.run`` is called."""
        count = len(self._program.graph.inputs)
        inputs, (weights, fixed, append, *rest) = arguments[:count], arguments[count:]
        self._weights, self._fixed, self._append = weights, fixed, append
        self._buffers = rest[0] if rest else {}
        results, new = self._graph(self._program.graph, inputs, "")
        if new:
            fixed[""] = new
        return results

    def _graph(self, graph: Graph, inputs: Sequence[Tensor], prefix: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The outputs and the new fixed states of one function."""
        signature = self._program.signatures[self._program.function(graph)]
        states = {state.name: state.value for state in graph.states}
        values: dict[Value, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
        values |= {states[s.name]: tensor for s, tensor in zip(signature.fixed, self._fixed[prefix], strict=True)}
        values |= {states[s.name]: tensor for s, tensor in zip(signature.append, self._append[prefix], strict=True)}
        weights = dict(zip(signature.weights, self._weights[prefix], strict=True))
        given = zip(signature.buffers, self._buffers.get(prefix, ()), strict=True)
        buffers = {(slot.node, slot.kind): found for slot, found in given}
        for node in graph.nodes:
            if isinstance(node.op, Call):
                made, new = self._graph(graph.region(node.op.region), [values[v] for v in node.inputs], node.op.prefix)
                self._fixed[node.op.prefix] = new
                values |= zip(node.outputs, made, strict=True)
                continue
            arguments = list(self._arguments(node, values, weights))
            extra = {kind: buffers[node.name, kind] for kind in ("out", "scratch") if (node.name, kind) in buffers}
            kernel = self._kernel(node)
            if self._on_arguments is not None:
                self._on_arguments(full_name(prefix, node), node, arguments)
            begun = perf_counter()
            made = self._finished(node, kernel(*arguments, **extra))
            seconds = perf_counter() - begun
            made = made if self._changed is None else self._changed(node, arguments, made)
            values |= zip(returned_values(node), made, strict=True)
            self._on_node(full_name(prefix, node), node, made, seconds)
        updates = dict(graph.updates)
        return tuple(values[value] for _, value in graph.outputs), tuple(values[updates[slot.name]] for slot in signature.fixed)

    @staticmethod
    def _arguments(node: Node, values: Mapping[Value, Tensor], weights: Mapping[WeightSlot, Tensor]) -> Iterator[Tensor]:
        layouts = {} if node.placement is None else dict(node.placement.layouts)
        for position, value in enumerate(node.inputs):
            if value.kind == "param" and node.placement is not None:
                yield weights[WeightSlot(value, node.placement.backend, layouts.get(position, ()))]
            else:
                yield values[value]

    def _kernel(self, node: Node) -> Callable[..., Any]:
        if id(node) not in self._kernels:
            self._kernels[id(node)] = node_runner(self._ctx, node)
        return self._kernels[id(node)]

    def _finished(self, node: Node, found: Any) -> tuple[Tensor, ...]:
        """The tensors that a kernel returned, computed also on a device that works on its own."""
        made = found if isinstance(found, tuple) else (found,)
        backend = self._ctx.backends[0] if node.placement is None else self._ctx.backend(node.placement.backend)
        if backend.device != "cpu":
            backend.to_host(made[-1].reshape(-1)[:1])
        return made
