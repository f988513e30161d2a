"""Fused ops in compiled segments: one compilation for one sequence and one for more, and the eager kernels' numbers."""

from functools import partial

import pytest

torch = pytest.importorskip("torch")

import deltaloom.ops  # noqa: E402, F401 - fills the registry
from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.backends.torch.inductor import InductorBackend  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.passes.kernel import Appended  # noqa: E402

HIDDEN, HEADS, WIDTH, EXPERTS, TAPS = 128, 2, 16, 6, 4
CHANNELS = 4 * HEADS * WIDTH
ORDER = (
    *("x", "delta", "w_norm", "w_in", "w_conv", "w_a_log", "w_dt_bias", "w_head", "conv", "state", "w_out"),
    *("w_qkv", "w_width", "cos", "sin", "keys", "values", "valid"),
    *("w_route", "w_up", "w_down", "w_shared_up", "w_shared_down", "w_both"),
)
SOURCE = """
def {name}({order}):
    x, h = add_rms_norm(x, delta, w_norm)
{net}    q, k, v, gate = qkv_norm_rope(linear(h, w_qkv), w_width, w_width, cos, sin)
    h = gated_attention(q, k, v, gate, keys, values, valid)
    weights, ids, gate = gated_router(linear(h, w_route))
    h = shared_moe(h, weights, ids, gate, w_up, w_down, w_shared_up, w_shared_down)
    return (x, packed_swiglu(linear(h, w_both)), conv, state)
"""
NET = """    h, conv, state = gated_delta_net(linear(h, w_in), w_conv, w_a_log, w_dt_bias, w_head, conv, state)
    x, h = add_rms_norm(x, linear(h, w_out), w_norm)
"""
ATTRIBUTES = {
    "add_rms_norm": {"eps": 1e-6, "zero_centred": True},
    "linear": {},
    "gated_delta_net": {
        "key_heads": HEADS, "value_heads": 2 * HEADS, "key_dim": WIDTH, "value_dim": WIDTH, "scale": 0.3, "eps": 1e-6
    },
    "qkv_norm_rope": {"heads": 2 * HEADS, "kv_heads": HEADS, "eps": 1e-6, "gated": True},
    "gated_attention": {"scale": 0.25},
    "gated_router": {"k": 3, "normalize": True},
    "shared_moe": {},
    "packed_swiglu": {},
}  # fmt: skip


def emitted(backend, name, net):
    """The function over this backend's kernels, as the emitter makes it."""
    space = {}
    for op, attributes in ATTRIBUTES.items():
        run = next(kernel.run for kernel in backend.kernels() if kernel.op == op)
        space[op] = partial(run, ops.get(op)(**attributes))
    exec(SOURCE.format(name=name, order=", ".join(ORDER), net=net), space)
    return space[name]


def weights():
    inner = 2 * HEADS * WIDTH
    shapes = {
        "w_norm": (HIDDEN,), "w_in": (HIDDEN, CHANNELS + inner + 4 * HEADS), "w_conv": (TAPS, 1, CHANNELS), "w_a_log": (2 * HEADS,),
        "w_dt_bias": (2 * HEADS,), "w_head": (WIDTH,), "w_out": (inner, HIDDEN), "w_qkv": (HIDDEN, 2 * inner + 2 * HEADS * WIDTH),
        "w_width": (WIDTH,), "w_route": (inner, EXPERTS + 1), "w_up": (EXPERTS, inner, 20), "w_down": (EXPERTS, 10, inner),
        "w_shared_up": (inner, 24), "w_shared_down": (12, inner), "w_both": (inner, 2 * HIDDEN),
    }  # fmt: skip
    return {name: torch.randn(shape) / (shape[-2] ** 0.5 if len(shape) > 1 else 1) for name, shape in shapes.items()}


def given(length, batch, seq, past, capacity):
    """Every argument by name; the same for the same sizes, in memory of its own."""
    torch.manual_seed(batch + 10 * seq)
    valid = torch.ones(batch, past + seq, dtype=torch.bool)
    valid[-1, :1] = False
    arguments = weights() | {"x": torch.randn(batch, seq, HIDDEN), "delta": torch.randn(batch, seq, HIDDEN), "valid": valid}
    arguments |= {"conv": torch.randn(batch, CHANNELS, TAPS - 1), "state": torch.randn(batch, 2 * HEADS, WIDTH, WIDTH)}
    arguments |= {"cos": torch.rand(batch, seq, 5), "sin": torch.rand(batch, seq, 5)}
    return arguments | {key: Appended(torch.randn(batch, HEADS, capacity, WIDTH), length(past)) for key in ("keys", "values")}


@pytest.mark.parametrize(
    ("name", "net", "sizes"),
    [
        ("decode", NET, ((2, 1, 5, 9), (1, 1, 5, 9), (4, 1, 6, 9), (1, 1, 8, 18), (3, 1, 10, 18))),
        ("prefill", "", ((2, 5, 0, 8), (1, 6, 0, 8), (3, 40, 6, 64), (1, 3, 8, 64))),
    ],
    ids=["decode", "prefill"],
)
def test_a_layer_is_compiled_for_one_sequence_and_for_more(name, net, sizes):
    eager, inductor = TorchBackend("cpu"), InductorBackend("cpu")
    function, plain = inductor.finish(emitted(inductor, name, net), name), emitted(eager, name, net)
    for size in sizes:
        got, expected = given(inductor.length, *size), given(eager.length, *size)
        results = function(*(got[key] for key in ORDER))
        for one, other in zip(results, plain(*(expected[key] for key in ORDER)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        for state in ("keys", "values"):
            torch.testing.assert_close(got[state].data, expected[state].data, rtol=1e-4, atol=1e-4)
        if net:
            assert results[2].data_ptr() == got["conv"].data_ptr() and results[3].data_ptr() == got["state"].data_ptr()
    assert inductor.compilations() == {name: 2}


def test_the_router_chooses_among_all_experts():
    """Each expert is the best of some token, the last one too; the gate is the column behind them."""
    kernel = next(kernel for kernel in InductorBackend("cpu").kernels() if kernel.op == "gated_router")
    logits = torch.cat([torch.eye(EXPERTS), torch.arange(EXPERTS)[:, None]], dim=1)[None]
    weights, ids, gate = kernel.run(ops.get("gated_router")(k=1, normalize=True), logits)
    assert ids[0, :, 0].tolist() == list(range(EXPERTS)) == gate[0, :, 0].tolist()
    assert (weights == 1).all()
