"""What every kernel of a backend is held to: the reference, its own guards, and the dtypes that it takes without being asked to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from deltaloom.graph.errors import GraphError
from deltaloom.graph.interpret import type_of
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DTYPES, DType, TensorType, bf16, f16, f32, f64
from deltaloom.passes.kernel import Backend, Kernel
from deltaloom.testing.checks import check_kernel
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete, draw_case, in_float64, one_node, reference
from deltaloom.testing.kernels import dtypes_of, run_kernel
from deltaloom.testing.measure import assert_close
from deltaloom.testing.suite import Check

FLOATS = (f64, f32, bf16, f16)
INTEGERS = tuple(dtype for dtype in DTYPES.values() if dtype.kind == "int")
SEEDS = 12
"""Cases from which a guard must have refused one."""


def kernel_checks(backend: Backend, kernel: Kernel, op: type[Op]) -> Iterator[Check]:
    """The checks of one kernel of ``backend`` for ``op``."""
    subject = f"kernel {kernel.name} for {op.name}"
    yield Check(subject, "agrees with the reference", partial(check_kernel, backend, kernel, op))
    if kernel.when or kernel.wants:
        yield Check(subject, "guards", partial(_guards, kernel, op), drawn=False)
    if others := [dtype for dtype in FLOATS if dtype not in dtypes_of(backend)]:
        yield Check(subject, "other dtypes", partial(_other_dtypes, backend, kernel, op, others))


def nodes_of(op: type[Op]) -> Iterator[Node]:
    """Nodes of ``op`` such as a guard may meet: in every float dtype, with inputs that are computed, parameters, or a mix."""
    for seed in range(SEEDS):
        case = draw_case(op, SeededDraw(seed))
        for dtype in FLOATS:
            types = tuple(map(type_of, concrete(case, dtype)))
            if _legal(case.op, types):
                yield from mixed_nodes(case.op, types)
                yield from _one_changed(case.op, types)


def mixed_nodes(op: Op, types: tuple[TensorType, ...]) -> Iterator[Node]:
    """The node of these types with all inputs parameters, or none, or all but one, or one alone."""
    stored = one_node(op, types, params=True).nodes[0]
    computed = one_node(op, types).nodes[0]
    for most, other in ((stored, computed), (computed, stored)):
        yield most
        for changed in range(len(types)):
            inputs = [(other if position == changed else most).inputs[position] for position in range(len(types))]
            yield replace(most, inputs=tuple(inputs))


def _one_changed(op: Op, types: tuple[TensorType, ...]) -> Iterator[Node]:
    """Nodes with one input in another dtype of its kind, where the op takes that."""
    for position, type_ in enumerate(types):
        for dtype in FLOATS if type_.dtype in FLOATS else INTEGERS if type_.dtype in INTEGERS else ():
            changed = (*types[:position], replace(type_, dtype=dtype), *types[position + 1 :])
            if dtype != type_.dtype and _legal(op, changed):
                yield one_node(op, changed, params=True).nodes[0]


def _legal(op: Op, types: tuple[TensorType, ...]) -> bool:
    """Whether the op takes these types; some of a case's dtypes are fixed, and may not go with every other."""
    try:
        op.output_types(*types)
    except GraphError:
        return False
    return True


def _guards(kernel: Kernel, op: type[Op], draw: Draw) -> None:
    """Each guard says no to some node that those before it accept, and what is wanted in another layout is a parameter."""
    silent = dict(enumerate(kernel.when))
    accepted = 0
    for node in nodes_of(op):
        for number, guard in enumerate(kernel.when):
            if (reason := guard(node)) is not None:
                assert len(reason) > 4, f"guard {number} of {kernel.name} refuses with {reason!r}, expected a reason"
                silent.pop(number, None)
                break
        if kernel.refusal(node) is None:
            accepted += 1
            for position, _ in kernel.layouts(node):
                kind = node.inputs[position].kind
                name = op.input_names()[position]
                found = f"{kernel.name} wants {name} in another layout and accepts one that is computed"
                assert kind == "param", f"{found}; add the guard is_param"
    assert accepted, f"{kernel.name} accepts none of the cases of {op.name}"
    never = ", ".join(f"{number} ({_named(guard)})" for number, guard in silent.items())
    assert not silent, f"{kernel.name} has guards that refuse no case of {op.name}: {never}; drop them, widen the cases, or list it"


def _named(guard: object) -> str:
    return str(getattr(guard, "__qualname__", guard)).replace(".<locals>", "")


def _other_dtypes(backend: Backend, kernel: Kernel, op: type[Op], dtypes: Sequence[DType], draw: Draw) -> None:
    """What the guards accept although the backend was not asked to compute in it, the kernel can run."""
    case = draw_case(op, draw)
    arrays = concrete(case, draw.choice(*dtypes))
    if not _legal(case.op, tuple(map(type_of, arrays))):
        return
    node = one_node(case.op, tuple(map(type_of, arrays)), params=True).nodes[0]
    if kernel.refusal(node) is not None:
        return
    truth, rounded = reference(case.op, in_float64(arrays)), reference(case.op, arrays)
    for position, value in enumerate(run_kernel(backend, kernel, node, arrays)):
        if not isinstance(value, QuantizedArray):
            assert_close(f"output {position} of {kernel.name} for {case.op}", value, truth[position], rounded[position])
