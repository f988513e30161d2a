"""The kit's way to run kernels finds kernels that are wrong or that break the calling convention."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltaloom.backends import backend
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.ops.attention import Attention
from deltaloom.ops.linear import Linear
from deltaloom.passes.kernel import Appended, Kernel, is_param, size
from deltaloom.testing.checks import check_kernel
from deltaloom.testing.draw import SeededDraw

NUMPY = backend("numpy")
SEEDS = range(30)


def sound_linear(op: Linear, x: Any, weight: Any, bias: Any = None) -> Any:
    return op.reference(x, weight, bias)


def transposed_linear(op: Linear, x: Any, weight: Any, bias: Any = None) -> Any:
    return op.reference(x, weight.T, bias)


def linear_without_bias(op: Linear, x: Any, weight: Any, bias: Any = None) -> Any:
    return op.reference(x, weight)


def scribbling_linear(op: Linear, x: Any, weight: Any, bias: Any = None) -> Any:
    y = op.reference(x, weight, bias)
    weight += 1
    return y


def attention(
    op: Attention, q: Any, k: Any, v: Any, keys: Appended, values: Appended, valid: Any = None, *, write: bool = True
) -> Any:
    out, new_keys, new_values = op.reference(
        q, k, v, keys.data[:, :, : keys.length], values.data[:, :, : values.length], valid
    )
    if write:
        keys.data[:, :, : new_keys.shape[2]] = new_keys
        values.data[:, :, : new_values.shape[2]] = new_values
    return out


def attention_that_reads_all(op: Attention, q: Any, k: Any, v: Any, keys: Appended, values: Appended, valid: Any = None) -> Any:
    grown = Appended(keys.data, keys.data.shape[2])
    if valid is not None or k.shape[1] + keys.length != grown.length:
        q = q + keys.data[:, :, -1:].mean()
    return attention(op, q, k, v, keys, values, valid)


def forgetful_attention(op: Attention, q: Any, k: Any, v: Any, keys: Appended, values: Appended, valid: Any = None) -> Any:
    return attention(op, q, k, v, keys, values, valid, write=False)


def ran(name: str, run: Callable[..., Any], **options: Any) -> int:
    """How many cases the kernel accepted; raises what the check raises."""
    op: type[Op] = ops.get(name)
    return sum(check_kernel(NUMPY, Kernel(name, "test", run, **options), op, SeededDraw(seed)) for seed in SEEDS)


def test_sound_kernels_pass() -> None:
    assert ran("linear", sound_linear, quantised=True) == len(SEEDS)
    assert 0 < ran("linear", transposed_linear, wants={"weight": (1, 0)}) == ran("linear", sound_linear) < len(SEEDS)
    assert ran("attention", attention) == len(SEEDS)


def test_guards_choose_the_cases() -> None:
    assert ran("linear", sound_linear, when=(is_param("weight"),), quantised=True) == len(SEEDS)
    assert 0 < ran("attention", attention, when=(size("q", 1, equals=1),)) < len(SEEDS)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("linear", linear_without_bias),
        ("linear", scribbling_linear),
        ("attention", forgetful_attention),
        ("attention", attention_that_reads_all),
    ],
)
def test_unsound_kernels_are_found(name: str, run: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        ran(name, run)


def test_a_fixed_state_may_be_overwritten() -> None:
    def in_place(op: Any, x: Any, weight: Any, state: Any) -> Any:
        y, new_state = op.reference(x, weight, state)
        np.copyto(state, new_state)
        return y, state

    assert ran("causal_conv1d", in_place) == len(SEEDS)
