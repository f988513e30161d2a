"""The inductor backend: a function as the emitter writes it, compiled within its budget, against the same function eager."""

import pytest

torch = pytest.importorskip("torch")

import deltaloom.ops  # noqa: E402, F401 - fills the registry
from deltaloom.backends.torch.backend import TorchBackend  # noqa: E402
from deltaloom.backends.torch.inductor import InductorBackend  # noqa: E402
from deltaloom.graph.errors import CompileError  # noqa: E402
from deltaloom.graph.registry import ops  # noqa: E402
from deltaloom.passes.kernel import Appended  # noqa: E402

HIDDEN, HEADS, WIDTH, TAPS = 24, 2, 6, 3
SOURCE = """
def both_layers_0(x, w_norm, w_mix, valid, w_conv, conv_state, w_gate, w_decay, delta_state, key_cache, value_cache, w_route, \
w_up, w_down):
    h = norm(norm_0, x, w_norm)
    h = mask(mask_0, h, valid)
    mixed, new_conv = conv(conv_0, linear(linear_0, h, w_mix), w_conv, conv_state)
    q, k, v = split(split_0, unflatten(unflatten_0, mixed))
    beta, log_decay = gates(gates_0, linear(linear_0, h, w_gate), linear(linear_0, h, w_gate), w_decay, w_decay)
    o, new_delta = delta(delta_0, unit(unit_0, q), unit(unit_0, k), v, log_decay, beta, delta_state)
    a = attend(attend_0, q, k, o, key_cache, value_cache, valid)
    h = add(add_0, x, flatten(flatten_0, a))
    weights, ids = route(route_0, linear(linear_0, h, w_route))
    y = add(add_0, h, experts(experts_0, h, weights, ids, w_up, w_down))
    return (y, new_conv, new_delta)
"""
NAMES = {
    "norm": ("rms_norm", {"eps": 1e-6, "zero_centred": True}),
    "mask": ("mask_padding", {}),
    "conv": ("causal_conv1d", {"activation": "silu"}),
    "linear": ("linear", {}),
    "split": ("split", {"sizes": (HEADS, HEADS, 2 * HEADS), "axis": 2}),
    "unflatten": ("unflatten", {"sizes": (4 * HEADS, WIDTH)}),
    "flatten": ("flatten", {"axes": 2}),
    "gates": ("delta_gates", {}),
    "delta": ("gated_delta_rule", {"scale": 0.4}),
    "unit": ("l2_norm", {}),
    "attend": ("attention", {"scale": 0.4}),
    "add": ("add", {}),
    "route": ("router_topk", {"k": 2, "normalize": True}),
    "experts": ("moe_experts", {}),
}


def emitted(backend, source=SOURCE):
    """The function in a namespace of ops and this backend's kernels, as the emitter makes it."""
    space = {}
    for name, (op, attributes) in NAMES.items():
        space[name] = next(k.run for k in backend.kernels() if k.op == op)
        space[f"{name}_0"] = ops.get(op)(**attributes)
    space["attend"] = attend_with_o(space["attend"])
    exec(source, space)
    return space["both_layers_0"]


def attend_with_o(run):
    """The delta rule's 2 * HEADS value heads become HEADS heads of twice the width."""
    return lambda op, q, k, o, *rest: run(op, q, k, o.reshape(*q.shape[:3], 2 * WIDTH), *rest)


def weights():
    torch.manual_seed(1)
    mix = 4 * HEADS * WIDTH
    return {
        "w_norm": torch.ones(HIDDEN), "w_mix": torch.randn(HIDDEN, mix) / 5, "w_conv": torch.randn(TAPS, 1, mix),
        "w_gate": torch.randn(HIDDEN, 2 * HEADS), "w_decay": torch.randn(2 * HEADS), "w_route": torch.randn(HIDDEN, 5),
        "w_up": torch.randn(5, HIDDEN, 14) / 5, "w_down": torch.randn(5, 7, HIDDEN) / 3,
    }  # fmt: skip


def generate(function, length, batch, calls):
    """Runs calls of these numbers of tokens; gives outputs and final states."""
    torch.manual_seed(batch)
    given, mix, past, capacity = weights(), 4 * HEADS * WIDTH, 0, 4
    conv, delta = torch.zeros(batch, mix, TAPS - 1), torch.zeros(batch, 2 * HEADS, WIDTH, WIDTH)
    keys, values = torch.zeros(batch, HEADS, capacity, WIDTH), torch.zeros(batch, HEADS, capacity, 2 * WIDTH)
    outputs = []
    for seq in calls:
        if past + seq > capacity:
            capacity = 2 * (past + seq)
            keys = torch.cat([keys[:, :, :past], torch.zeros(batch, HEADS, capacity - past, WIDTH)], 2)
            values = torch.cat([values[:, :, :past], torch.zeros(batch, HEADS, capacity - past, 2 * WIDTH)], 2)
        x = torch.randn(batch, seq, HIDDEN)
        valid = torch.ones(batch, past + seq, dtype=torch.bool)
        valid[-1, :1] = False
        caches = {"key_cache": Appended(keys, length(past)), "value_cache": Appended(values, length(past))}
        states = {"x": x, "valid": valid, "conv_state": conv, "delta_state": delta, **caches}
        order = SOURCE.replace("\n", "").split("(", 1)[1].split(")", 1)[0].split(", ")
        y, conv, delta = function(*({**given, **states}[name] for name in order))
        outputs.append(y)
        past += seq
    return [*outputs, conv, delta, keys[:, :, :past], values[:, :, :past]]


def test_one_compilation_a_class_of_sizes_and_the_same_numbers():
    """Prompts, chunks, single tokens and growing caches of several batches: four compilations."""
    eager, inductor = TorchBackend("cpu"), InductorBackend("cpu")
    function = inductor.finish(emitted(inductor), "both_layers_0")
    for batch, calls in ((1, (3, 1, 1, 5, 1)), (2, (2, 1, 4, 1, 70)), (1, (40, 1)), (4, (4, 1, 1)), (3, (5, 3, 1))):
        got = generate(function, inductor.length, batch, calls)
        expected = generate(emitted(eager), eager.length, batch, calls)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert inductor.compilations() == {"both_layers_0": 4}


def test_what_cannot_be_compiled_is_a_sentence_with_the_cause():
    def branches(x):
        return (x + 1,) if x.sum() > 0 else (x,)

    function = InductorBackend("cpu").finish(branches, "attention_layer_7")
    with pytest.raises(CompileError, match="torch.compile cannot compile 'attention_layer_7'") as found:
        function(torch.ones(2, 3))
    assert found.value.__cause__ is not None


def test_a_missing_compiler_is_a_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match="needs a C\\+\\+ compiler, and 'no-such-compiler' was not found"):
        InductorBackend("cpu")


def test_torch_settings_are_left_as_they_were():
    from torch.fx.experimental import _config

    before = _config.use_duck_shape
    function = InductorBackend("cpu").finish(lambda x: (x + 1,), "small")
    assert function(torch.ones(2, 3))[0].sum() == 12
    assert _config.use_duck_shape == before


def test_states_carry_no_marks_of_the_compiler():
    """torch would take the marks of a state that lives on as a reason to compile again."""
    function = InductorBackend("cpu").finish(lambda x, state: (x + 1, state.add_(1)), "small")
    _, state = function(torch.ones(2, 3), torch.zeros(2, 3))
    assert not [name for name in state.__dict__ if "dynamo" in name]
