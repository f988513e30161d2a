"""Node by node gives what the emitted code gives: outputs and states, on every backend, one node after the other."""

from collections.abc import Sequence

import numpy as np
import pytest

import deltaloom
from deltaloom.graph.ir import Call, Node
from deltaloom.graph.op import Array
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Variant
from deltaloom.passes.emit import returned_values
from deltaloom.passes.kernel import Tensor
from deltaloom.runtime.observe import full_name, observe

OUTPUTS = ("last_logits",)


class Seen:
    """Notes of what was called, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def __call__(self, name: str, node: Node, outputs: Sequence[Tensor], seconds: float) -> None:
        assert seconds >= 0 and len(outputs) == len(returned_values(node))
        self.names.append(name)
        self.shapes[name] = [tuple(one.shape) for one in outputs]


@pytest.mark.parametrize("backends", [("numpy",), ("torch",), ("torch", "numpy")], ids="+".join)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_observed_runs_are_plain_runs(backends: tuple[str, ...], count: int, padded: bool) -> None:
    kernels = {"linear": ("numpy",)} if backends == ("torch", "numpy") else {}
    model = deltaloom.load("tiny-next", config=CompileConfig(backends=backends, kernels=kernels, threads=1))
    rng = np.random.default_rng(count)
    valid: Array = np.ones((2, 9), bool)
    valid[1, :4] = not padded
    before = rng.integers(0, model.config.vocab_size, (2, 9))
    state = model.new_state(2)
    model.forward(before, state=state, attention_mask=valid, logits=None)
    other, seen = state.copy(), Seen()
    inputs = {"token_ids": rng.integers(0, model.config.vocab_size, (2, count))}
    plain = model.main.run(inputs, state, None, OUTPUTS)
    observed = observe(model.main, inputs, other, None, OUTPUTS, seen)
    assert other.length == state.length == 9 + count and not other.broken
    for name, values in plain.items():
        np.testing.assert_array_equal(observed[name], values)
    left, right = state.arrays(), other.arrays()
    assert left.keys() == right.keys()
    for name, values in left.items():
        np.testing.assert_array_equal(values, right[name], err_msg=name)
    graph = model.main.program(Variant(count == 1, padded, OUTPUTS)).graph
    expected = {full_name(i.prefix, node) for i in graph.instances() for node in i.graph.nodes if not isinstance(node.op, Call)}
    assert len(seen.names) == len(set(seen.names)) and set(seen.names) == expected
    assert seen.names.index("layers.0.x.sum") < seen.names.index("layers.3.self_attn.o_proj") < seen.names.index("last_logits")
    assert seen.shapes["layers.3.self_attn.o_proj"] == [(2, count, model.config.hidden_size)]


def test_a_run_that_is_stopped_leaves_a_broken_state() -> None:
    model = deltaloom.load("tiny-next")
    state = model.new_state()

    def stop(name: str, node: Node, outputs: Sequence[Tensor], seconds: float) -> None:
        if name.startswith("layers.2."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(model.main, {"token_ids": np.ones((1, 3), np.int64)}, state, None, OUTPUTS, stop)
    with pytest.raises(deltaloom.graph.errors.RequestError, match="this state is unusable"):
        model.forward([1], state=state)
