"""The kit's way to run kernels finds those that misuse the buffers of a memory plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deltaloom.backends import backend
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Op
from deltaloom.graph.registry import ops
from deltaloom.graph.types import TensorType
from deltaloom.passes.kernel import Kernel
from deltaloom.testing.checks import check_kernel
from deltaloom.testing.draw import SeededDraw

NUMPY = backend("numpy", threads=1)
ADD, CONVOLUTION = "add", "causal_conv1d"


def ran(name: str, run: Callable[..., Any], **options: Any) -> int:
    """How many of 20 cases the kernel accepted; raises what the check raises."""
    op: type[Op] = ops.get(name)
    return sum(check_kernel(NUMPY, Kernel(name, "test", run, **options), op, SeededDraw(seed)) for seed in range(20))


def scratch(node: Node) -> tuple[TensorType, ...]:
    return (node.inputs[0].type,)


def sound(op: Any, x: Any, y: Any, *, out: Any = None, scratch: Any = None) -> Any:
    work = np.empty(x.shape, x.dtype) if scratch is None else scratch[0]
    work[...] = y
    return np.add(x, work, out=out)


def elsewhere(op: Any, x: Any, y: Any, *, out: Any = None) -> Any:
    return x + y


def adds_to_what_is_there(op: Any, x: Any, y: Any, *, out: Any = None) -> Any:
    if out is None:
        return x + y
    out -= out
    out += x + y
    return out


def trusts_scratch(op: Any, x: Any, y: Any, *, scratch: Any = None) -> Any:
    return x + y if scratch is None else x + y + 0 * scratch[0]


def through_an_input(op: Any, x: Any, y: Any, *, out: Any = None) -> Any:
    if out is None:
        return x + y
    x += y
    out[...] = x
    return out


def state_in_scratch(op: Any, x: Any, weight: Any, state: Any, *, scratch: Any = None) -> Any:
    y, new = op.reference(x, weight, state)
    if scratch is None:
        return y, new
    scratch[0][...] = new
    return y, scratch[0]


def test_a_sound_kernel_passes() -> None:
    assert ran(ADD, sound, into=True, scratch=scratch) == 20


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (elsewhere, {"into": True}, "returned another"),
        (adds_to_what_is_there, {"into": True}, "with buffers"),
        (trusts_scratch, {"scratch": scratch}, "with buffers"),
        (through_an_input, {"into": True}, "changed its input 0"),
    ],
)
def test_a_kernel_that_misuses_its_buffers_fails(run: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        ran(ADD, run, **options)


def test_a_new_state_must_not_lie_in_scratch() -> None:
    with pytest.raises(AssertionError, match="the new state that test.state_in_scratch returns lies in input or buffer 3"):
        ran(CONVOLUTION, state_in_scratch, scratch=lambda node: (node.inputs[2].type,))
