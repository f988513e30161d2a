"""The table that the kernel files fill, and what they share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltaloom.backends.numpy.threads import share
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array
from deltaloom.graph.types import bf16
from deltaloom.ops.quantized import READERS
from deltaloom.passes.kernel import KernelTable, input_type

table = KernelTable("numba")

STREAM = 1 << 22
"""Weights from which reading them is worth two threads: one core reads 18e9 a second from memory (so 230 us), two 21e9 to 23e9,
and to hand work over takes 20 to 45 us."""


def weights_in_bfloat16(node: Node) -> str | None:
    """A guard: all weights of the node are bfloat16."""
    for name in READERS[node.op.name]:
        found = input_type(node, name).dtype
        if found != bf16:
            return f"{name} is {found}, not bf16; --quantise bf16 makes it so"
    return None


def bits(weight: Array) -> Array:
    """The numbers of a bfloat16 array as uint16."""
    return np.ascontiguousarray(weight).view(np.uint16)


def shared(run: Callable[[int, int], object], length: int, weights: int) -> None:
    """``run(start, stop)`` over ``length``, by all threads if it reads so many ``weights`` that they gain."""
    share(lambda part: run(part.start, part.stop), length, worth=weights >= STREAM)
