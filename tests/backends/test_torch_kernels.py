"""The torch kernels against the ops' definitions in float64: generated cases, and sizes at which a kernel changes its way."""

from itertools import islice

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import deltaloom.ops  # noqa: E402, F401 - fills the registry
from deltaloom.backends.torch import attention, bags, convolution, delta_rule, linear, moe  # noqa: E402
from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.graph.op import Case  # noqa: E402
from deltaloom.graph.quantized import QuantizedArray  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.graph.types import bf16, f16, f32, f64  # noqa: E402
from deltaloom.ops.fused import Fused  # noqa: E402
from deltaloom.passes.kernel import Appended  # noqa: E402
from deltaloom.testing.draw import SeededDraw  # noqa: E402
from deltaloom.testing.evaluate import concrete, in_float64, one_node, reference, type_of  # noqa: E402
from deltaloom.testing.kernels import accepted_node, run_kernel  # noqa: E402
from deltaloom.testing.measure import assert_close  # noqa: E402

BACKEND = TorchBackend("cpu", 2)
KERNELS = list(BACKEND.kernels())
ACCELERATED = [kernel for kernel in KERNELS if kernel.title != "portable"]
DTYPES = (f64, f32, bf16, f16)


def check(kernel, case, dtype):
    arrays = concrete(case, dtype)
    node = accepted_node(kernel, case.op, arrays)
    assert node is not None, f"{kernel.name} refuses {case.op}"
    truth, rounded = reference(case.op, in_float64(arrays)), reference(case.op, arrays)
    for name, value, exact, own in zip(case.op.outputs, run_kernel(BACKEND, kernel, node, arrays), truth, rounded, strict=False):
        if isinstance(value, QuantizedArray):
            assert (value.data.tobytes(), value.scale.tobytes()) == (own.data.tobytes(), own.scale.tobytes())
        else:
            assert_close(f"{name} of {case.op} in {dtype}", value, exact, own)


def accepted_cases(kernel, dtype, count):
    """The first cases that the kernel's guards accept and that are in the range of the dtype."""

    def accepts(case):
        arrays = concrete(case, dtype)
        finite = all(isinstance(a, QuantizedArray) or np.isfinite(a.astype(np.float64)).all() for a in arrays)
        return finite and accepted_node(kernel, case.op, arrays) is not None

    drawn = (ops.get(kernel.op).cases(SeededDraw(seed)) for seed in range(100))
    found = list(islice(filter(accepts, drawn), count))
    assert len(found) == count, f"{kernel.name} accepts {len(found)} of 100 cases"
    return found


def named(op, title=None):
    return next(k for k in KERNELS if k.op == op and (title is None or k.title == title))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.op}-{k.name}")
def test_kernel_agrees_with_reference(kernel, dtype):
    for case in accepted_cases(kernel, dtype, 10):
        check(kernel, case, dtype)


def attention_case(draw, batch, past, seq, key_heads, group, width, mask):
    arrays = [
        draw.normal(batch, seq, key_heads * group, width),
        draw.normal(batch, seq, key_heads, width),
        draw.normal(batch, seq, key_heads, width + 1),
        draw.normal(batch, key_heads, past, width),
        draw.normal(batch, key_heads, past, width + 1),
    ]
    if mask == "left":
        starts = np.arange(batch) * (past + seq) // batch
        arrays.append(np.arange(past + seq) >= starts[:, None])
    elif mask == "any":
        arrays.append(draw.uniform(0, 1, batch, past + seq) < 0.5)
    elif mask == "nothing":
        arrays.append(np.zeros((batch, past + seq), bool))
    return Case(ops.get("attention")(scale=width**-0.5), tuple(arrays))


@pytest.mark.parametrize("dtype", (f64, f32, bf16), ids=str)
@pytest.mark.parametrize("mask", ["", "left", "any", "nothing"])
@pytest.mark.parametrize(
    ("past", "seq"), [(0, 1), (0, 2), (0, 63), (0, 64), (0, 65), (0, 131), (1, 1), (37, 1), (37, 3), (64, 130)]
)
def test_attention_at_block_borders(past, seq, mask, dtype):
    draw = SeededDraw(past + 7 * seq)
    for batch, key_heads, group in ((1, 1, 1), (3, 2, 4)):
        check(named("attention"), attention_case(draw, batch, past, seq, key_heads, group, 5, mask), dtype)


def test_attention_in_little_memory(monkeypatch):
    """With room for few scores the blocks shrink to single queries, and the result stays."""
    monkeypatch.setattr(attention, "SCORES", 100)
    for mask in ("", "left"):
        check(named("attention"), attention_case(SeededDraw(3), 2, 11, 40, 2, 2, 8, mask), f64)


def test_attention_needs_no_more_memory_for_a_longer_prompt(monkeypatch):
    largest = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: largest.append(x.numel()) or softmax(x, dim))
    for seq in (256, 1024, 4096):
        q, k = torch.zeros(1, seq, 16, 2), torch.zeros(1, seq, 2, 2)
        caches = torch.zeros(2, 1, 2, seq, 2)
        attention.append_and_attend(q, k, k, caches[0], caches[1], 0, None, 1.0)
    assert max(largest) <= attention.SCORES


def delta_case(draw, batch, seq, key_heads, repeats, key_dim, value_dim, *, decay, beta, keys):
    gate = (batch, seq, key_heads * repeats)

    def unit(x):
        return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)

    q, k = (unit(draw.rng.standard_normal((batch, seq, key_heads, key_dim))) for _ in range(2))
    k = np.broadcast_to(k[:, :1], k.shape).copy() if keys == "equal" else k
    log_decay = -draw.uniform(0, 1e-3, *gate) if decay == "slow" else np.full(gate, float(decay))
    betas = draw.uniform(0, 1, *gate) if beta == "any" else np.full(gate, float(beta))
    v = draw.rng.standard_normal((batch, seq, key_heads * repeats, value_dim))
    state = draw.rng.standard_normal((batch, key_heads * repeats, key_dim, value_dim))
    op = ops.get("gated_delta_rule")(scale=key_dim**-0.5)
    return Case(op, (q, k, v, log_decay, betas, state), (f32, f32, None, f32, f32, f32))


class Seeded(SeededDraw):
    """The generator is open, for numbers without the occasional large ones."""

    def __init__(self, seed):
        super().__init__(seed)
        self.rng = np.random.default_rng(seed)


@pytest.mark.parametrize("dtype", (f64, f32, bf16), ids=str)
@pytest.mark.parametrize("seq", [1, 2, 3, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize(
    ("decay", "beta", "keys"), [("slow", "any", "any"), (0, 1, "equal"), (-20, "any", "any"), (0, 0, "any"), (-0.5, 1, "any")]
)
def test_delta_rule_at_chunk_borders(seq, decay, beta, keys, dtype):
    for batch, repeats in ((1, 1), (2, 3)):
        case = delta_case(Seeded(seq), batch, seq, 2, repeats, 16, 11, decay=decay, beta=beta, keys=keys)
        check(named("gated_delta_rule"), case, dtype)


def test_delta_rule_over_several_segments(monkeypatch):
    monkeypatch.setattr(delta_rule, "SEGMENT", 128)
    for seq in (128, 129, 256, 300):
        case = delta_case(Seeded(seq), 2, seq, 1, 2, 8, 8, decay="slow", beta="any", keys="any")
        check(named("gated_delta_rule"), case, f64)


def test_delta_rule_writes_the_state_that_it_was_given():
    draw = Seeded(1)
    for seq in (1, 70):
        case = delta_case(draw, 1, seq, 1, 2, 4, 4, decay="slow", beta="any", keys="any")
        tensors = [torch.from_numpy(array) for array in case.arrays]
        strided = torch.zeros(1, 2, 4, 8, dtype=torch.float64)[..., ::2]
        strided.copy_(tensors[-1])
        _, new = named("gated_delta_rule").run(case.op, *tensors)
        _, same = named("gated_delta_rule").run(case.op, *tensors[:-1], strided)
        assert new is tensors[-1] and same is strided
        torch.testing.assert_close(same, new)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("taps", [1, 2, 4, 9])
def test_convolution_in_blocks(taps, activation, monkeypatch):
    monkeypatch.setattr(convolution, "BLOCK", 64)
    draw = SeededDraw(taps)
    for seq in (1, 2, 3, 8, 9, 17):
        arrays = (draw.normal(2, seq, 5), draw.normal(5, 1, taps), draw.normal(2, 5, taps - 1))
        for dtype in DTYPES:
            check(named("causal_conv1d"), Case(ops.get("causal_conv1d")(activation), arrays), dtype)


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("values", ["few", "negative", "zeros"])
def test_router_breaks_ties_by_the_lowest_id(rows, values):
    rng = np.random.default_rng(rows)
    logits = rng.integers(-3, 3, (2, rows, 33)).astype(np.float64) / 4
    if values == "negative":
        logits = -np.abs(logits)
    elif values == "zeros":
        logits = np.where(logits < 0, 0.0, -0.0)
    for dtype in (f32, bf16):
        check(named("router_topk"), Case(ops.get("router_topk")(k=7, normalize=True), (logits,)), dtype)


@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (3, 5), (1, 64)])
def test_experts_with_uneven_loads(tokens):
    """All tokens on one expert, and experts without any."""
    draw = SeededDraw(sum(tokens))
    x, weights = draw.normal(*tokens, 7), draw.uniform(0, 1, *tokens, 2)
    gate_up, down = draw.normal(6, 10, 7), draw.normal(6, 7, 5)
    for ids in (np.array([5, 0]), np.array([2, 3])):
        everyone = np.broadcast_to(ids, (*tokens, 2)).astype(np.int32)
        for dtype in (f64, f32, bf16):
            check(named("moe_experts"), Case(ops.get("moe_experts")(), (x, weights, everyone, gate_up, down)), dtype)


@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (16, 1), (1, 17)])
def test_experts_on_both_sides_of_the_border(tokens, monkeypatch):
    """Token by token up to BAG_ROWS, sorted above: the results are the same, the ways are not."""
    assert tokens[0] * tokens[1] <= moe.BAG_ROWS or tokens == (1, 17)
    taken = []
    for way in ("_token_by_token", "_sorted"):
        run = getattr(moe, way)
        monkeypatch.setattr(moe, way, lambda *given, run=run, way=way: taken.append(way) or run(*given))
    for name in ("moe_experts", "shared_moe"):
        op = ops.get(name)
        draw = SeededDraw(sum(tokens))
        shapes = ((*tokens, 7), (*tokens, 3), (*tokens, 3), (*tokens, 1), (6, 10, 7), (6, 7, 5), (8, 7), (7, 4))
        given = {key: draw.normal(*shape) for key, shape in zip(ops.get("shared_moe").input_names(), shapes, strict=True)}
        given["ids"] = np.argsort(draw.uniform(0, 1, *tokens, 6), -1)[..., :3].astype(np.int32)
        for dtype in DTYPES:
            check(named(name), Case(op(), tuple(given[key] for key in op.input_names())), dtype)
    assert set(taken) == {"_sorted" if tokens == (1, 17) else "_token_by_token"}


@pytest.mark.parametrize("width", [128, 192, 191, 127, 1])
@pytest.mark.parametrize("rows", [2, 64, 65])
def test_products_of_few_rows_in_parts(rows, width, monkeypatch):
    """Cut into as many equal parts as there are threads, if the parts are large enough and the dtype is not narrow."""
    batches = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "bmm", lambda x, y: batches.append(len(x)) or bmm(x, y))
    draw = SeededDraw(rows)
    arrays = (draw.normal(1, rows, width), draw.normal(5, width), draw.normal(5))
    for given in (arrays[:2], arrays):
        for dtype in DTYPES:
            check(named("linear"), Case(ops.get("linear")(), given), dtype)
    cut = rows <= linear.FEW and width in (128, 192)
    assert batches == ([2] * 4 if cut else [])  # two dtypes, with and without bias


@pytest.mark.parametrize(("columns", "count"), [(1, 1), (127, 1), (128, 2), (129, 1), (192, 3), (256, 2), (65, 1), (195, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_one_row_are_bags_of_columns(columns, count, dtype, monkeypatch):
    """As many equal parts as there are threads, if they are wide enough; float64 has no fast bags."""
    found = []
    embedding_bag = bags.embedding_bag
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(
        bags, "embedding_bag", lambda rows, *given, **named: found.append(len(rows)) or embedding_bag(rows, *given, **named)
    )
    draw = SeededDraw(columns)
    for shape in ((1, 1, 7), (1, 7)):
        check(
            named("linear"), Case(ops.get("linear")(), (draw.normal(*shape), draw.normal(columns, 7), draw.normal(columns))), dtype
        )
    assert found == ([] if dtype == f64 else [count] * 2)


def test_no_more_parts_than_threads():
    x = torch.zeros(1, 6 * 64)
    for threads, expected in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 6), (64, 6)):
        assert linear.parts(x, 6 * 64, threads) == expected
        assert linear.parts(x.bfloat16(), 6 * 64, threads) == linear.parts(x.to("meta"), 6 * 64, threads) == 1


def delta_net_case(draw, batch, key_heads, repeats, key_dim, value_dim):
    heads = key_heads * repeats
    keys, values = key_heads * key_dim, heads * value_dim
    op = ops.get("gated_delta_net")(key_heads, heads, key_dim, value_dim, scale=key_dim**-0.5, eps=1e-6)
    arrays = (
        draw.normal(batch, 1, 2 * keys + 2 * values + 2 * heads),
        draw.normal(2 * keys + values, 1, 4),
        draw.normal(heads),
        draw.normal(heads),
        draw.normal(value_dim),
        draw.normal(batch, 2 * keys + values, 3),
        draw.uniform(-1, 1, batch, heads, key_dim, value_dim),
    )
    return Case(op, arrays, (None, None, None, None, None, None, f32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "key_heads", "repeats", "key_dim", "value_dim"), [(1, 1, 1, 1, 1), (1, 2, 1, 8, 8), (3, 2, 3, 5, 7), (1, 1, 4, 16, 3)]
)
def test_delta_net_of_one_token(batch, key_heads, repeats, key_dim, value_dim, dtype):
    check(named("gated_delta_net"), delta_net_case(Seeded(batch), batch, key_heads, repeats, key_dim, value_dim), dtype)


def test_delta_net_of_more_tokens_is_refused_with_the_reason():
    op = ops.get("gated_delta_net")
    case = next(case for case in (op.cases(SeededDraw(seed)) for seed in range(100)) if case.arrays[0].shape[1] == 3)
    node = one_node(case.op, tuple(map(type_of, concrete(case, f32))), params=True).nodes[0]
    assert named("gated_delta_net").refusal(node) == "axis 1 of projected is 3, not 1"


def test_delta_net_writes_the_states_that_it_was_given():
    case = delta_net_case(Seeded(1), 2, 1, 2, 4, 4)
    projected, weight, *weights, conv, delta = (torch.from_numpy(array) for array in case.arrays)
    given = (case.op, projected, weight.permute(2, 1, 0).contiguous(), *weights)
    strided = [torch.zeros(*state.shape[:-1], 2 * state.shape[-1], dtype=state.dtype)[..., ::2] for state in (conv, delta)]
    for state, other in zip((conv, delta), strided, strict=True):
        other.copy_(state)
    one, other = named("gated_delta_net").run(*given, conv, delta), named("gated_delta_net").run(*given, *strided)
    assert one[1] is conv and one[2] is delta and other[1] is strided[0] and other[2] is strided[1]
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right)


def one_token_case(name):
    """A case of a fused op with one sequence and one token."""
    draw = SeededDraw(1)
    if name == "gated_delta_net":
        return delta_net_case(draw, 1, 2, 2, 4, 4)
    cases = (ops.get(name).cases(SeededDraw(seed)) for seed in range(2000))
    single = (case for case in cases if case.arrays[0].shape[:2] == (1, 1))
    return next(case for case in single if accepted_node(named(name), case.op, concrete(case, f32)) is not None)


ONE_TOKEN = (
    *("add_rms_norm", "packed_swiglu", "gated_delta_net", "qkv_norm_rope"),
    *("gated_attention", "gated_router", "moe_experts", "shared_moe"),
)


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_one_token_on_another_device_waits_for_nothing(name):
    """Tensors of the device "meta" have no numbers: what mixes in tensors of the CPU, or asks for a number on the host, raises."""
    case, kernel = one_token_case(name), named(name)
    arrays = concrete(case, f32)
    node = accepted_node(kernel, case.op, arrays)
    layouts = dict(kernel.layouts(node))
    given = []
    for position, (argument, array) in enumerate(zip(case.op.input_names(), arrays, strict=False)):
        tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(layouts.get(position, range(array.ndim))))).to("meta")
        past = tensor.shape[2] if argument in case.op.appends else 0
        room = [*tensor.shape[:2], past + 1, *tensor.shape[3:]]
        given.append(Appended(tensor.new_empty(room), past) if argument in case.op.appends else tensor)
    results = kernel.run(case.op, *given)
    results = results if isinstance(results, tuple) else (results,)
    appended = {case.op.updates[argument] for argument in case.op.appends}
    shapes = [tuple(v.type.shape) for position, v in enumerate(node.outputs) if position not in appended]
    assert [tuple(result.shape) for result in results] == shapes
    assert {result.device.type for result in results} == {"meta"}


def test_every_kernel_has_a_unique_name():
    names = [(kernel.op, kernel.name) for kernel in KERNELS]
    assert len(names) == len(set(names))
    assert all(kernel.backend == "torch" for kernel in KERNELS)


def test_portable_comes_after_accelerated():
    """Fused ops have no portable kernel: where no other takes one, it is taken apart."""
    for kernel in ACCELERATED:
        titles = [other.title for other in KERNELS if other.op == kernel.op]
        accelerated = [title for title in titles if title != "portable"]
        assert titles == accelerated + ([] if issubclass(ops.get(kernel.op), Fused) else ["portable"])
