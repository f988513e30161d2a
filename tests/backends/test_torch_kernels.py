"""The torch kernels against the ops' definitions in float64: generated cases, and sizes at which a kernel changes its way."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import deltaloom.ops  # noqa: E402, F401 - fills the registry
from deltaloom.backends.torch import attention, convolution, delta_rule  # noqa: E402
from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.graph.op import Case  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.graph.types import bf16, f16, f32, f64  # noqa: E402
from deltaloom.testing.draw import SeededDraw  # noqa: E402
from deltaloom.testing.evaluate import concrete, in_float64, reference  # noqa: E402
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
        assert_close(f"{name} of {case.op} in {dtype}", value, exact, own)


def named(op, title=None):
    return next(k for k in KERNELS if k.op == op and (title is None or k.title == title))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.op}-{k.name}")
def test_kernel_agrees_with_reference(kernel, dtype):
    for seed in range(10):
        check(kernel, ops.get(kernel.op).cases(SeededDraw(seed)), dtype)


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


def test_every_kernel_has_a_unique_name():
    names = [(kernel.op, kernel.name) for kernel in KERNELS]
    assert len(names) == len(set(names))
    assert all(kernel.backend == "torch" for kernel in KERNELS)


def test_portable_comes_after_accelerated():
    for kernel in ACCELERATED:
        titles = [other.title for other in KERNELS if other.op == kernel.op]
        assert titles == ["", "portable"]
