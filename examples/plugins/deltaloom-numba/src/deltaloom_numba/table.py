"""The table that the kernel files fill, and what they share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltaloom.backends.numpy.threads import share
from deltaloom.graph.op import Array
from deltaloom.passes.kernel import KernelTable

table = KernelTable("numba")

STREAM = 1 << 22
"""Weights from which reading them is worth two threads: one core reads 18e9 a second from memory (so 230 us), two 21e9 to 23e9,
and to hand work over takes 20 to 45 us."""


def bits(weight: Array) -> Array:
    """The numbers of a bfloat16 array as uint16."""
    return np.ascontiguousarray(weight).view(np.uint16)


def shared(run: Callable[[int, int], object], length: int, weights: int) -> None:
    """``run(start, stop)`` over ``length``, by all threads if it reads so many ``weights`` that they gain."""
    share(lambda part: run(part.start, part.stop), length, worth=weights >= STREAM)
