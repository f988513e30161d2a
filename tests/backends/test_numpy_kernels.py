"""Every accelerated NumPy kernel against the float64 reference of its op, without a warning (of overflow none is due)."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.backends.numpy.backend import NumpyBackend
from deltaloom.backends.numpy.threads import use_threads
from deltaloom.graph.ir import Node, Value
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import Appended, Kernel
from deltaloom.testing.draw import CaseDraw, SeededDraw
from deltaloom.testing.evaluate import as_tuple, concrete, draw_case, in_float64, reference, type_of
from deltaloom.testing.measure import assert_close

KERNELS = [k for k in NumpyBackend().kernels() if k.title != "reference" or k.op == "attention"]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    yield use_threads(request.param)
    use_threads(None)


def node_of(op: Op, arrays) -> Node:
    values = tuple(Value(f"in{i}", type_of(array), "param") for i, array in enumerate(arrays))
    types = op.output_types(*(value.type for value in values))
    return Node(op, values, tuple(Value(f"out{i}", type_) for i, type_ in enumerate(types)))


def run_kernel(kernel: Kernel, node: Node, arrays):
    """All outputs of the op, appended states included; what lies behind them must stay untouched."""
    op, names = node.op, node.op.input_names()
    inputs = [deepcopy(array) for array in arrays]
    for position, axes in kernel.layouts(node):
        inputs[position] = np.ascontiguousarray(inputs[position].transpose(axes))
    room = {}
    for name, axis in op.appends.items():
        past = arrays[names.index(name)]
        new = node.outputs[op.updates[name]].type.shape[axis]
        shape = [*past.shape]
        shape[axis] = new + 3
        data = np.full(shape, 77.0, past.dtype)
        data[(slice(None),) * axis + (slice(0, past.shape[axis]),)] = past
        inputs[names.index(name)] = Appended(data, past.shape[axis])
        room[op.updates[name]] = (data, axis, new)
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error")
        results = iter(as_tuple(kernel.run(op, *inputs)))
    outputs = []
    for position in range(len(node.outputs)):
        if position in room:
            data, axis, new = room[position]
            assert np.all(data[(slice(None),) * axis + (slice(new, None),)] == 77.0)
            outputs.append(data[(slice(None),) * axis + (slice(0, new),)])
        else:
            outputs.append(next(results))
    assert next(results, None) is None
    return outputs


def agree(kernel: Kernel, op: Op, arrays) -> bool:
    """Compare with the reference; False where a guard refuses."""
    node = node_of(op, arrays)
    if kernel.refusal(node) is not None:
        return False
    truth, rounded = reference(op, in_float64(arrays)), reference(op, arrays)
    for position, got in enumerate(run_kernel(kernel, node, arrays)):
        assert_close(f"{kernel.name} output {position} of {op}", got, truth[position], rounded[position])
    return True


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.op}:{k.name}")
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_generated_cases(kernel, dtype, data):
    case = draw_case(ops.get(kernel.op), CaseDraw(data))
    agree(kernel, case.op, concrete(case, dtype))


RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


LARGE = {
    "linear": lambda: ("linear", {}, [normal(1, 160, 256), normal(520, 256), normal(520)]),
    "linear, one row of a large weight": lambda: ("linear", {}, [normal(1, 1, 1024), normal(3100, 1024)]),
    "linear, three rows of a large weight": lambda: ("linear", {}, [normal(1, 3, 1024), normal(1100, 1024)]),
    "silu": lambda: ("silu", {}, [normal(2, 300, 333)]),
    "sigmoid": lambda: ("sigmoid", {}, [normal(2, 300, 333)]),
    "swiglu": lambda: ("swiglu", {}, [normal(2, 300, 333), normal(2, 300, 333)]),
    "sigmoid_gate": lambda: ("sigmoid_gate", {}, [normal(2, 300, 333), normal(2, 300, 1)]),
    "rms_norm": lambda: ("rms_norm", {"eps": 1e-6}, [normal(2, 300, 333), normal(333)]),
    "gated_rms_norm": lambda: ("gated_rms_norm", {"eps": 1e-6}, [normal(2, 300, 7, 32), normal(2, 300, 7, 32), normal(32)]),
    "l2_norm": lambda: ("l2_norm", {}, [normal(2, 300, 7, 32)]),
    "conv": lambda: ("causal_conv1d", {"activation": "silu"}, [normal(2, 150, 700), normal(700, 1, 4), normal(2, 700, 3)]),
    "q/k/v, norm, rope": lambda: (
        "qkv_norm_rope",
        {"heads": 4, "kv_heads": 2, "gated": True, "eps": 1e-6},
        [normal(2, 70, 12 * 48), normal(48), normal(48), normal(2, 70, 8), normal(2, 70, 8)],
    ),
    "router": lambda: ("router_topk", {"k": 8, "normalize": True}, [normal(2, 40, 130)]),
    "router, one row": lambda: ("router_topk", {"k": 8, "normalize": False}, [normal(1, 1, 130)]),
}


@pytest.mark.parametrize("name", LARGE)
def test_sizes_that_are_cut_into_blocks(name):
    op, attributes, arrays = LARGE[name]()
    ran = [agree(k, ops.get(op)(**attributes), tuple(arrays)) for k in KERNELS if k.op == op]
    assert any(ran)


def test_tokens_with_slots_of_their_own_are_computed_in_them(monkeypatch):
    """As only large states are; of several sequences, of which some share a slot, and so are not."""
    from deltaloom.backends.numpy import serving

    found: dict[str, list[bool]] = {}
    own_slots = serving._own_slots
    monkeypatch.setattr(serving, "IN_PLACE", 0)
    for kernel in (k for k in KERNELS if "write_slots" in ops.get(k.op).input_names()):
        taken = found.setdefault(kernel.op, [])
        monkeypatch.setattr(serving, "_own_slots", lambda *a, taken=taken: taken.append(own_slots(*a)) or taken[-1])
        for seed in range(60):
            case = ops.get(kernel.op).cases(SeededDraw(seed))
            given = dict(zip(case.op.input_names(), concrete(case, f32)))
            agree(kernel, case.op, tuple(given.values()))
            reads = given["read_slots"]
            if len(reads) == len(given["write_slots"]) and len(set(reads)) == len(reads):
                agree(kernel, case.op, tuple((given | {"write_slots": reads}).values()))
    assert found and all(set(taken) == {False, True} for taken in found.values()), found


def experts_case(tokens, experts, k, hidden, inner):
    ids = np.argsort(RNG.random((1, tokens, experts)), axis=-1)[..., :k].astype(np.int32)
    weights = RNG.random((1, tokens, k)).astype(np.float32)
    gate_up, down = normal(experts, 2 * inner, hidden) / 8, normal(experts, hidden, inner) / 8
    return normal(1, tokens, hidden), weights, ids, gate_up, down


@pytest.mark.parametrize("tokens, experts, k, hidden, inner", [(130, 7, 3, 96, 64), (1, 9, 8, 520, 300), (2, 5, 2, 33, 9)])
def test_experts_over_threads(tokens, experts, k, hidden, inner):
    kernel = next(k for k in KERNELS if k.op == "moe_experts")
    assert agree(kernel, ops.get("moe_experts")(), experts_case(tokens, experts, k, hidden, inner))


def test_experts_in_parts_of_the_tokens_are_the_same(monkeypatch):
    from deltaloom.backends.numpy import moe

    kernel = next(k for k in KERNELS if k.op == "moe_experts")
    arrays = experts_case(50, 6, 2, 32, 16)
    node = node_of(ops.get("moe_experts")(), arrays)
    whole = run_kernel(kernel, node, arrays)[0]
    monkeypatch.setattr(moe, "RESULTS", 7 * 2 * 32)
    assert np.allclose(run_kernel(kernel, node, arrays)[0], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experts", [16, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 5])
def test_router_ties_go_to_the_lowest_expert(experts, rows):
    kernel = next(k for k in KERNELS if k.op == "router_topk")
    op = ops.get("router_topk")(k=6, normalize=True)
    for levels in (1, 2, 3, 10):
        logits = RNG.integers(0, levels, (1, rows, experts)).astype(np.float32)
        _, ids = kernel.run(op, logits)
        expected = np.argsort(-logits, axis=-1, kind="stable")[..., :6]
        assert ids.dtype == np.int32 and np.array_equal(ids, expected)
        assert np.array_equal(logits, logits.copy())


@pytest.mark.parametrize("op, shape", [("sigmoid", (1, 1, 9)), ("silu", (1, 1, 9)), ("silu", (1, 9000, 9))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_values_are_exact_and_warn_of_overflow_only(op, shape, dtype):
    kernel = next(k for k in KERNELS if k.op == op)
    x = np.full(shape, np.finfo(dtype).max / 4, dtype)
    x[..., ::2] *= -1
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error")
        y = kernel.run(ops.get(op)(), x)
    assert np.isfinite(y).all()
    positive = y[..., 1::2]
    assert np.all(positive == (1 if op == "sigmoid" else x[..., 1::2]))


def test_gates_far_out_are_exact():
    kernel = next(k for k in KERNELS if k.op == "delta_gates")
    b = np.array([[[-200, 200, 0, 5, -5]]], np.float32)
    a = np.array([[[-200, 200, 0, 90, -90]]], np.float32)
    zeros = np.zeros(5, np.float32)
    beta, log_decay = kernel.run(ops.get("delta_gates")(), b, a.copy(), zeros, zeros)
    assert np.allclose(beta, [[[0, 1, 0.5, 0.9933072, 0.0066929]]], atol=1e-7)
    assert np.allclose(log_decay, [[[0, -200, -np.log(2), -90, 0]]], rtol=1e-6)


def test_inputs_are_not_written():
    for kernel in KERNELS:
        rng = np.random.default_rng(3)
        for _ in range(12):
            case = draw_case(ops.get(kernel.op), _Seeded(int(rng.integers(1 << 30))))
            arrays = concrete(case, f32)
            node = node_of(case.op, arrays)
            if kernel.refusal(node) is not None or case.op.appends:
                continue
            states = {case.op.input_names().index(name) for name in case.op.updates}
            inputs = [deepcopy(array) for array in arrays]
            for position, axes in kernel.layouts(node):
                inputs[position] = np.ascontiguousarray(inputs[position].transpose(axes))
            kept = [deepcopy(array) for array in inputs]
            kernel.run(case.op, *inputs)
            for position, (before, after) in enumerate(zip(kept, inputs)):
                pair = (before, after) if isinstance(before, np.ndarray) else (before.data, after.data)
                assert position in states or np.array_equal(*pair), f"{kernel.name} wrote input {position}"


def _Seeded(seed):
    from deltaloom.testing.draw import SeededDraw

    return SeededDraw(seed)
