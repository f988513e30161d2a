"""Kernels for compiled segments, called as they are: against the definitions in float64, and what they tell torch of themselves."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import deltaloom.ops  # noqa: E402, F401 - fills the registry
from deltaloom.backends.torch import compiled  # noqa: E402
from deltaloom.backends.torch.inductor import InductorBackend  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.graph.types import bf16, f32, f64  # noqa: E402
from deltaloom.testing.draw import SeededDraw  # noqa: E402
from deltaloom.testing.evaluate import concrete, in_float64, one_node, reference, type_of  # noqa: E402
from deltaloom.testing.kernels import accepted_node, run_kernel  # noqa: E402
from deltaloom.testing.measure import assert_close  # noqa: E402

KERNELS = compiled.table.kernels


@pytest.fixture(scope="module")
def inductor():
    return InductorBackend("cpu")


KERNELS_OF_DTYPES = [
    pytest.param(kernel, dtype, id=f"{kernel.name}-{dtype}")
    for kernel in KERNELS
    for dtype in (f64, f32, bf16)
    if dtype == f32 or "bfloat16" not in kernel.name  # weights in bfloat16 stand beside float32
]


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_OF_DTYPES)
def test_kernel_agrees_with_reference(kernel, dtype, inductor):
    accepted = 0
    for seed in range(40):
        case = ops.get(kernel.op).cases(SeededDraw(seed))
        arrays = concrete(case, dtype)
        node = accepted_node(kernel, case.op, arrays)
        if node is None:
            continue
        accepted += 1
        truth, rounded = reference(case.op, in_float64(arrays)), reference(case.op, arrays)
        for position, value in enumerate(run_kernel(inductor, kernel, node, arrays)):
            assert_close(f"output {position} of {case.op} in {dtype}", value, truth[position], rounded[position])
    assert accepted >= 4, f"{kernel.name} accepts {accepted} of 40 cases"


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.wants], ids=lambda kernel: kernel.name)
def test_a_kernel_that_wants_a_layout_takes_parameters_only(kernel):
    """The weight that it wants stored otherwise must be one that is stored: each, not only some."""
    cases = (ops.get(kernel.op).cases(SeededDraw(seed)) for seed in range(100))
    case = next(case for case in cases if accepted_node(kernel, case.op, concrete(case, f32)))
    types = tuple(map(type_of, concrete(case, f32)))
    stored = one_node(case.op, types, params=True).nodes[0]
    assert kernel.refusal(stored) is None
    computed = one_node(case.op, types, params=False).nodes[0]
    names = case.op.input_names()
    for wanted in kernel.wants:
        inputs = [c if name == wanted else s for name, s, c in zip(names, stored.inputs, computed.inputs)]
        mixed = type(stored)(stored.op, tuple(inputs), stored.outputs)
        assert wanted in str(kernel.refusal(mixed))


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_custom_ops_declare_what_they_return_and_write():
    """torch's own check: the schema names every input that is written, and the fake has the sizes, strides and dtype."""
    checks = ("test_schema", "test_faketensor")
    q, k, v, keys, values = tensors((2, 3, 4, 5), (2, 3, 2, 5), (2, 3, 2, 7), (2, 2, 9, 5), (2, 2, 9, 7))
    for valid in (None, torch.ones(2, 7, dtype=torch.bool)):
        torch.library.opcheck(compiled._attention, (q, k, v, keys, values, torch.tensor(4), valid, 0.5), test_utils=checks)
    for seq in (1, 3):
        q, k, v, decay, beta, state = tensors(
            (2, seq, 2, 5), (2, seq, 2, 5), (2, seq, 4, 6), (2, seq, 4), (2, seq, 4), (2, 4, 5, 6)
        )
        torch.library.opcheck(compiled._gated_delta_rule, (q, k, v, -decay.abs(), beta, state, 0.5), test_utils=checks)
        x, weights, gate_up, down = tensors((1, seq, 5), (1, seq, 2), (4, 5, 6), (4, 3, 5))
        for shape in ((1, 1, 128), (2, seq, 128)):
            torch.library.opcheck(compiled._product, tuple(tensors(shape, (128, 192))), test_utils=checks)
        ids = torch.tensor(np.arange(2 * seq).reshape(1, seq, 2) % 4, dtype=torch.int32)
        torch.library.opcheck(compiled._moe_experts, (x, weights, ids, gate_up, down), test_utils=checks)
