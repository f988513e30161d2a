"""Random graphs of regions, views and states for tests of the memory plan, and a toy backend whose kernels take buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from toy import Toy, by_reference, toy_context

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.ir import Graph, Node, Value
from deltaloom.graph.types import DType, TensorType, f32
from deltaloom.passes.assign import Assign
from deltaloom.passes.emit import Program, emit
from deltaloom.passes.kernel import Kernel
from deltaloom.passes.pipeline import run_pipeline
from deltaloom.passes.segment import Transfers

BATCH, PAST = symbol("batch"), symbol("past", low=0)
RUBBISH = 1e30
WIDEST = 32


class ToyWithBuffers(Toy):
    """A toy backend that plans memory: an arena is filled with NaN."""

    def arena(self, nbytes: int) -> Any:
        whole = np.full(nbytes + 64, 255, np.uint8)
        start = -whole.ctypes.data % 64
        return whole[start : start + nbytes]

    def part(self, arena: Any, offset: int, shape: Sequence[int], dtype: DType) -> Any:
        return np.ndarray(tuple(shape), dtype.numpy, arena, offset)


def _into(run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that spoils its scratch and its buffers before it reads an input, and refuses those that overlap."""

    def kernel(op: Any, *inputs: Any, out: Any = None, scratch: Any = None) -> Any:
        results = run(op, *(x.copy() for x in inputs))
        buffers = [*(out if isinstance(out, tuple) else () if out is None else (out,)), *(scratch or ())]
        for number, buffer in enumerate(buffers):
            assert not any(np.shares_memory(buffer, other) for other in (*inputs, *buffers[number + 1 :]))
            buffer.fill(RUBBISH)
        if out is None:
            return results
        for target, result in zip(buffers, results if isinstance(results, tuple) else (results,), strict=False):
            target[...] = result
        return out

    return kernel


def _views(op: Any, x: Any) -> Any:
    width = op.sizes[0]
    return x[:, :width], x[:, width:]


def _two(node: Node) -> str | None:
    return None if len(node.outputs) == 2 else "not two parts"


def _scratch(node: Node) -> tuple[TensorType, ...]:
    return node.inputs[0].type, f32[PAST, 3]


KERNELS = (
    Kernel("add", "numpy", _into(by_reference), title="add", into=True, scratch=_scratch),
    Kernel("mul", "numpy", _into(by_reference), title="mul", into=True),
    Kernel("silu", "numpy", _into(by_reference), title="silu", scratch=lambda node: (f32[7],)),
    Kernel("concat", "numpy", _into(by_reference), title="concat", into=True),
    Kernel("split", "numpy", _views, when=(_two,), title="views"),
    Kernel("split", "numpy", _into(by_reference), title="copies", into=True),
)


def compiled(graph: Graph) -> Program:
    """``graph`` placed on the toy backend and emitted."""
    ctx = toy_context(ToyWithBuffers("numpy", only=(), first=KERNELS))
    return emit(run_pipeline(graph, (Assign(), Transfers()), ctx, properties=frozenset({"lifted"})).graph, ctx, "test")


def random_graph(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Graph:
    """Up to two regions, each called some times, between nodes of the top level."""
    regions = [_body(draw, f"region{number}", []) for number in range(draw(st.integers(0, 2)))]
    return _body(draw, "top", regions)


def _body(draw: Callable[[st.SearchStrategy[Any]], Any], name: str, regions: list[Graph]) -> Graph:
    g = GraphBuilder(name)
    pool: list[Value] = [
        g.input(f"x{number}", f32[BATCH, draw(st.sampled_from((4, 8)))]) for number in range(draw(st.integers(1, 3)))
    ]
    pool.append(g.state("s", f32[BATCH, 4]))
    for number in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(("add", "mul", "add", "silu", "concat", "two", "three", *(["call"] * 4 if regions else []))))
        pool += _step(g, draw, kind, pool, regions, number)
    g.update(s=draw(st.sampled_from([value for value in pool if value.type == pool[0].type.with_shape(BATCH, 4)])))
    for number in range(draw(st.integers(1, 3))):
        g.output(f"y{number}", draw(st.sampled_from(pool[-4:])))
    return g.build()


def _step(g: GraphBuilder, draw: Any, kind: str, pool: list[Value], regions: list[Graph], number: int) -> list[Value]:
    """The values of one more node."""
    x = draw(st.sampled_from(pool))
    width = x.type.shape[1]
    same = [value for value in pool if value.type == x.type]
    if kind == "call":
        region = draw(st.sampled_from(regions))
        fitting = [[value for value in pool if value.type == one.type] for one in region.inputs]
        if not all(fitting):
            return [g.silu(x)]
        made = g.call(region, *(draw(st.sampled_from(values)) for values in fitting), prefix=f"call{number}.")
        return list(made) if isinstance(made, tuple) else [made]
    if kind in ("add", "mul"):
        return [getattr(g, kind)(x, draw(st.sampled_from(same)))]
    if kind == "concat" and 2 * width <= WIDEST:
        return [g.concat(x, draw(st.sampled_from(same)), axis=-1)]
    if kind == "two" and width > 1:
        return list(g.split(x, sizes=(width // 2, width - width // 2), axis=-1))
    if kind == "three" and width > 2:
        return list(g.split(x, sizes=(1, 1, width - 2), axis=-1))
    return [g.silu(x)]


class Runner:
    """A program with its states, beside the reference interpreter with the same."""

    def __init__(self, program: Program, graph: Graph, batch: int) -> None:
        self.program, self.graph, self.batch = program, graph, batch
        self._rng = np.random.default_rng(7)
        self.states = {name: self._numbers(state.value.type) for name, state in graph.all_states().items()}

    def _numbers(self, type_: TensorType) -> Any:
        return self._rng.uniform(0.5, 1.0, type_.substitute({"batch": self.batch}).static_shape()).astype(np.float32)

    def step(self, *buffers: Any) -> None:
        """Run both on new inputs; outputs and new states must be equal."""
        from deltaloom.graph.interpret import interpret

        inputs = {value.name: self._numbers(value.type) for value in self.graph.inputs}
        fixed = {p: tuple(self.states[p + slot.name].copy() for slot in s.fixed) for p, s in self.program.by_prefix().items()}
        empty = dict.fromkeys(fixed, ())
        want = interpret(self.graph, inputs, {}.__getitem__, self.states)
        with np.errstate(all="ignore"):
            found = self.program.run(*(inputs[v.name] for v in self.program.graph.inputs), empty, fixed, empty, *buffers)
        for arena in buffers:
            _spoil(arena)
        for name, array in zip(self.program.outputs, found, strict=True):
            np.testing.assert_array_equal(array, want.outputs[name], err_msg=name)
        for prefix, signature in self.program.by_prefix().items():
            for slot, array in zip(signature.fixed, fixed[prefix], strict=True):
                np.testing.assert_array_equal(array, want.states[prefix + slot.name], err_msg=prefix + slot.name)
        self.states = want.states


def _spoil(buffers: Any) -> None:
    """NaN in every buffer."""
    for entry in (entry for entries in buffers.values() for entry in entries):
        for array in entry if isinstance(entry, tuple) else () if entry is None else (entry,):
            array.fill(np.nan)
