"""NumPy's kernels leave narrow dtypes alone where their references say where to round; what every kernel's guards must do is in the
kit (``deltaloom.testing.kernel_checks``)."""

import pytest

from deltaloom.backends import backend
from deltaloom.graph.registry import ops
from deltaloom.graph.types import bf16, f16
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.evaluate import concrete, one_node, type_of

KERNELS = [kernel for kernel in backend("numpy").kernels() if not kernel.title]

MOVES = {"zeros_like", "unflatten", "flatten", "split", "concat", "embedding", "mask_padding"}
"""NumPy kernels that only move numbers, and so take any dtype; `add` and `mul` round once, as their references do."""


@pytest.mark.parametrize("dtype", (bf16, f16), ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_a_numpy_kernel_that_rounds_in_between_refuses_narrow_dtypes(kernel, dtype):
    """Their references say where a narrow dtype is rounded; kernels that compute in one go do not, and so must leave it alone."""
    taken = 0
    for seed in range(12):
        case = ops.get(kernel.op).cases(SeededDraw(seed))
        arrays = concrete(case, dtype)
        node = one_node(case.op, tuple(map(type_of, arrays)), params=True).nodes[0]
        taken += any(value.type.dtype == dtype for value in node.inputs) and kernel.refusal(node) is None
    assert (taken > 0) == (kernel.op in MOVES | {"add", "mul"}), f"{taken} of 12 cases"
