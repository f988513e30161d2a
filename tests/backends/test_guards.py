"""What a kernel's guards accept, its code can run: dtypes that the backend was not asked for, and weights that are computed."""

from importlib.util import find_spec

import pytest

from deltaloom.backends import backend
from deltaloom.graph.ir import Node
from deltaloom.graph.registry import ops
from deltaloom.graph.types import bf16, f16, f32, f64
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete, in_float64, one_node, reference, type_of
from deltaloom.testing.kernels import run_kernel
from deltaloom.testing.measure import assert_close

NAMES = ["numpy", "torch"] if find_spec("torch") else ["numpy"]
BACKENDS = {name: backend(name, device="cpu") for name in NAMES}
KERNELS = [
    pytest.param(name, kernel, id=f"{kernel.op}-{kernel.name}")
    for name, engine in BACKENDS.items()
    for kernel in engine.kernels()
    if not kernel.title
]


def mixed_nodes(kernel, op, types):
    """The node of these types, with each subset of its inputs as parameters that one input makes larger or smaller."""
    stored = one_node(op, types, params=True).nodes[0]
    computed = one_node(op, types, params=False).nodes[0]
    for nodes in ((stored, computed), (computed, stored)):
        yield nodes[0]
        for changed in range(len(types)):
            inputs = [nodes[position == changed].inputs[position] for position in range(len(types))]
            yield Node(op, tuple(inputs), stored.outputs)


@pytest.mark.parametrize("dtype", (f64, f32, bf16, f16), ids=str)
@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_what_is_accepted_agrees_with_the_reference(name, kernel, dtype):
    for seed in range(12):
        case = ops.get(kernel.op).cases(SeededDraw(seed))
        arrays = concrete(case, dtype)
        node = one_node(case.op, tuple(map(type_of, arrays)), params=True).nodes[0]
        if kernel.refusal(node) is not None:
            continue
        truth, rounded = reference(case.op, in_float64(arrays)), reference(case.op, arrays)
        for position, value in enumerate(run_kernel(BACKENDS[name], kernel, node, arrays)):
            assert_close(f"output {position} of {case.op} in {dtype}", value, truth[position], rounded[position])


@pytest.mark.parametrize(("name", "kernel"), KERNELS)
def test_a_weight_that_is_wanted_in_another_layout_is_a_parameter(name, kernel):
    """Only what is stored can be stored otherwise; what is computed comes in the layout of its type."""
    accepted = 0
    for seed in range(12):
        case = ops.get(kernel.op).cases(SeededDraw(seed))
        for node in mixed_nodes(kernel, case.op, tuple(map(type_of, concrete(case, f32)))):
            if kernel.refusal(node) is None:
                accepted += 1
                assert all(node.inputs[position].kind == "param" for position, _ in kernel.layouts(node)), kernel.name
    assert accepted


MOVES = {"zeros_like", "unflatten", "flatten", "split", "concat", "embedding", "mask_padding"}
"""NumPy kernels that only move numbers, and so take any dtype; `add` and `mul` round once, as their references do."""


@pytest.mark.parametrize("dtype", (bf16, f16), ids=str)
@pytest.mark.parametrize(
    "kernel", [case.values[1] for case in KERNELS if case.values[0] == "numpy"], ids=lambda k: f"{k.op}-{k.name}"
)
def test_a_numpy_kernel_that_rounds_in_between_refuses_narrow_dtypes(kernel, dtype):
    """Their references say where a narrow dtype is rounded; kernels that compute in one go do not, and so must leave it alone."""
    taken = 0
    for seed in range(12):
        case = ops.get(kernel.op).cases(SeededDraw(seed))
        arrays = concrete(case, dtype)
        node = one_node(case.op, tuple(map(type_of, arrays)), params=True).nodes[0]
        taken += any(value.type.dtype == dtype for value in node.inputs) and kernel.refusal(node) is None
    assert (taken > 0) == (kernel.op in MOVES | {"add", "mul"}), f"{taken} of 12 cases"
