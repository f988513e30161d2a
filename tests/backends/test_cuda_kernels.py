"""The cuda backend's kernels against the ops' definitions in float64: on a GPU where there is one, else under Triton's interpreter.

The interpreter cuts bfloat16 off where a device rounds, so that dtype is left to devices."""

import os
from itertools import islice

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import deltaloom.ops  # noqa: E402, F401 - fills the registry
from deltaloom.backends.cuda import linear, moe_grouped  # noqa: E402
from deltaloom.backends.cuda.backend import CudaBackend  # noqa: E402
from deltaloom.graph.errors import CompileError  # noqa: E402
from deltaloom.graph.op import Case  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.graph.types import QuantType, bf16, f8_e4m3, f16, f32, f64, i8  # noqa: E402
from deltaloom.ops.quantized import Quantize  # noqa: E402
from deltaloom.testing.draw import SeededDraw  # noqa: E402
from deltaloom.testing.evaluate import concrete, in_float64, reference  # noqa: E402
from deltaloom.testing.kernel_checks import nodes_of  # noqa: E402
from deltaloom.testing.kernels import accepted_node, run_kernel  # noqa: E402
from deltaloom.testing.measure import assert_close  # noqa: E402

BACKEND = CudaBackend("cuda" if GPU else "cpu")
OWN = [kernel for kernel in BACKEND.kernels() if not kernel.portable and not kernel.title.startswith("torch_")]
DTYPES = (f32, bf16, f16) if GPU else (f32, f16)
FP8 = str(QuantType(f8_e4m3, (128, 128), f32))


def named(op):
    return next(kernel for kernel in OWN if kernel.op == op)


def check(kernel, case, dtype):
    arrays = concrete(case, dtype)
    node = accepted_node(kernel, case.op, arrays)
    assert node is not None, f"{kernel.name} refuses {case.op}"
    truth, rounded = reference(case.op, in_float64(arrays)), reference(case.op, arrays)
    for name, value, exact, own in zip(case.op.outputs, run_kernel(BACKEND, kernel, node, arrays), truth, rounded, strict=False):
        assert_close(f"{name} of {case.op} in {dtype}", value, exact, own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", OWN, ids=lambda k: f"{k.op}-{k.name}")
def test_kernel_agrees_with_reference(kernel, dtype):
    def accepted(case):
        return accepted_node(kernel, case.op, concrete(case, dtype)) is not None

    drawn = (ops.get(kernel.op).cases(SeededDraw(seed)) for seed in range(200))
    cases = list(islice(filter(accepted, drawn), 6))
    assert len(cases) == 6
    for case in cases:
        check(kernel, case, dtype)


@pytest.mark.parametrize("kernel", [kernel for kernel in OWN if kernel.when], ids=lambda k: f"{k.op}-{k.name}")
def test_every_guard_refuses_something(kernel):
    silent = set(kernel.when)
    for node in (*nodes_of(ops.get(kernel.op)), *too_large(kernel.op)):
        silent -= {guard for guard in silent if guard(node) is not None}
    assert not silent


def too_large(op):
    """Nodes that only the guards for sizes refuse."""
    from deltaloom.graph.interpret import type_of
    from deltaloom.testing.evaluate import one_node

    case = ops.get(op).cases(SeededDraw(0))
    types = list(map(type_of, concrete(case, f32)))
    made = ops.get(op)
    wide = {"add_rms_norm": lambda: (case.op, [t.with_shape(*t.shape[:-1], 20000) for t in types])}
    wide["gated_router"] = lambda: (case.op, [types[0].with_shape(1, 1, 5000)])
    wide["gated_paged_attention"] = lambda: (made(1.0), attention_types(1, 300))
    wide["packed_gated_delta_net"] = lambda: delta_net_node(300)
    wide["qkv_norm_rope"] = lambda: (made(1, 1, 1e-6), [f32[1, 1, 60000], f32[20000], f32[20000], f32[1, 1, 1], f32[1, 1, 1]])
    wide["shared_moe"] = lambda: (made(), moe_types(100, 70, None))
    for one in (wide.get(op), (lambda: (made(), moe_types(384, 2, FP8))) if op == "shared_moe" else None):
        if one is not None:
            yield one_node(one()[0], tuple(one()[1]), params=True).nodes[0]


def attention_types(heads, width):
    from deltaloom.graph.types import i32

    q = f32[1, 1, heads, width]
    pool = f32[2, heads, 16, width]
    return [q, q, q, f32[1, 1, heads * width], pool, pool, i32[1, 1], i32[1]]


def delta_net_node(width):
    from deltaloom.graph.types import i32

    op = ops.get("packed_gated_delta_net")(1, 1, width, width, scale=1.0, eps=1e-6)
    weights = [f32[3 * width, 1, 4], f32[1], f32[1], f32[width], f32[2, 3 * width, 3], f32[2, 1, width, width]]
    return op, [f32[1, 1, 4 * width + 2], *weights, i32[1], i32[1]]


def moe_types(inner, k, form):
    from deltaloom.graph.types import i32, parse_quant

    dtype = parse_quant(form) if form else f32
    experts, hidden = max(k, 2), 128
    stacks = [dtype[experts, inner, hidden], dtype[experts, hidden, inner // 2], dtype[inner, hidden], dtype[hidden, inner // 2]]
    return [f32[1, 1, hidden], f32[1, 1, k], i32[1, 1, k], f32[1, 1, 1], *stacks]


def moe_case(draw, tokens, experts, k, hidden, inner, form=None):
    """Experts that some tokens share, some nobody chose; ``form``: how weights are stored."""
    ids = np.argsort(draw.uniform(0.0, 1.0, tokens, experts), axis=-1)[:, :k]
    weights = [
        draw.uniform(-1.0, 1.0, *shape) / np.sqrt(shape[-1])
        for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner), (2 * inner, hidden), (hidden, inner))
    ]
    if form is not None:
        weights = [Quantize(form).reference(weight) for weight in weights]
    x = draw.uniform(-2.0, 2.0, 1, tokens, hidden)
    parts = (draw.uniform(0.0, 1.0, 1, tokens, k), ids[None].astype(np.int32), draw.uniform(-3.0, 3.0, 1, tokens, 1))
    return Case(ops.get("shared_moe")(), (x, *parts, *weights))


@pytest.mark.parametrize("tokens", [1, 2, 9, moe_grouped.FEW, moe_grouped.FEW + 1, 40])
def test_experts_for_few_and_many_tokens(tokens):
    for experts, k, hidden, inner in ((9, 3, 33, 20), (5, 5, 16, 16)):
        check(named("shared_moe"), moe_case(SeededDraw(tokens), tokens, experts, k, hidden, inner), f32)


@pytest.mark.parametrize("tokens", [1, 3, 12, 20])
def test_experts_in_fp8(tokens):
    check(named("shared_moe"), moe_case(SeededDraw(tokens), tokens, 3, 2, 200, 128, FP8), f32)


@pytest.mark.parametrize("rows", [1, 2, 17, 70])
def test_products_with_fp8(rows):
    draw = SeededDraw(rows)
    for out, width in ((130, 128), (64, 300), (256, 257)):
        weight = Quantize(FP8).reference(draw.uniform(-1.0, 1.0, out, width))
        check(named("linear"), Case(ops.get("linear")(), (draw.uniform(-1.0, 1.0, 1, rows, width), weight)), f32)


@pytest.mark.parametrize("width", [1, 3, 16, 17, 300, 2000])
def test_products_of_few_rows_and_any_width(width):
    draw = SeededDraw(width)
    case = Case(ops.get("linear")(), (draw.uniform(-1.0, 1.0, 1, 5, width), draw.uniform(-1.0, 1.0, 20, width)))
    check(named("linear"), case, f32)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [1, 17, 2048, 4096])
def test_tiles_of_few_rows_fit_the_device(width, itemsize):
    """227 KB of shared memory on the smallest of the devices with compute capability 9.0; the matrix units take 16 columns."""
    block = linear.plain_block(width, itemsize)
    assert block >= 16 and (linear.FEW + 64) * block * itemsize * linear.STAGES <= 227 << 10


@pytest.mark.parametrize(
    "tiles, count, blocks, parts",
    [(32, 8, 32, 8), (32, 64, 32, 4), (192, 8, 16, 2), (1, 2, 1, 1), (9, 8, 3, 1), (1, 2, 40, 8)],
)
def test_columns_are_cut_for_enough_programs(tiles, count, blocks, parts):
    assert linear.split_of(tiles, count, blocks) == parts


@pytest.mark.parametrize("count", [2, 20])
def test_sums_of_parts_leave_their_counters_at_zero(count):
    draw = SeededDraw(count)
    weight = Quantize(FP8).reference(draw.uniform(-1.0, 1.0, 130, 1100))
    case = Case(ops.get("linear")(), (draw.uniform(-1.0, 1.0, 1, count, 1100), weight))
    for _ in range(2):
        check(named("linear"), case, f32)


def test_other_forms_are_refused():
    weight = Quantize(str(QuantType(i8, (1, None), f32))).reference(np.ones((4, 4)))
    case = Case(ops.get("linear")(), (np.ones((1, 1, 4)), weight))
    assert accepted_node(named("linear"), case.op, concrete(case, f32)) is None


@pytest.mark.parametrize("past", [0, 1, 31, 32, 200])
def test_attention_in_parts(past):
    draw = SeededDraw(past)
    heads, group, width, size = 2, 3, 20, 16
    blocks = -(-(past + 1) // size) + 1
    new = [draw.uniform(-1.0, 1.0, 1, 2, heads * n, width) for n in (group, 1, 1)]
    gate = draw.uniform(-3.0, 3.0, 1, 2, heads * group * width)
    pools = [draw.uniform(-1.0, 1.0, 2 * blocks + 1, heads, size, width) for _ in range(2)]
    tables = 1 + np.arange(2 * blocks)[::-1].reshape(2, blocks).astype(np.int32)
    contexts = np.asarray([past, past // 2], np.int32)
    check(named("gated_paged_attention"), Case(ops.get("gated_paged_attention")(0.3), (*new, gate, *pools, tables, contexts)), f32)


def test_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("deltaloom.backends.cuda.backend.interpreted", lambda: False)
    with pytest.raises(CompileError, match="runs on an NVIDIA GPU, not on 'cpu'"):
        CudaBackend("cpu")


def test_float64_is_refused():
    with pytest.raises(CompileError, match="cannot compute in 'float64'"):
        BACKEND.compute_dtype("float64")
    assert f64 not in DTYPES
