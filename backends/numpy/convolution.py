"""The short causal convolution of the NumPy backend.

The weight is kept taps first, and the new state is returned as a view of a taps-first array: so every operation runs along
channels. (A state that comes the other way round, a fresh one for example, costs one strided copy.)
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np

from deltaloom.backends.numpy.elementwise import BLOCK, one_plus_exp_negative, silu_into
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import pool
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import dtype_in, is_param, size


class _HasActivation(Protocol):
    activation: str


WANTS = {"weight": (2, 1, 0)}
WHEN = (dtype_in("x", f32, f64), is_param("weight"))


@table.kernel("causal_conv1d", when=(size("x", 1, equals=1), *WHEN), wants=WANTS)
def convolution_step(op: Op, x: Array, weight: Array, state: Array) -> tuple[Array, Array]:
    """One token: the window is built once, and its last columns are the new state."""
    window = np.concatenate((state.transpose(0, 2, 1), x), axis=1)
    y: Array = (window * weight[:, 0]).sum(axis=1, keepdims=True)
    if cast(_HasActivation, op).activation == "silu":
        sums, y = y, np.empty_like(y)
        silu_into(y, sums)
    return y, window[:, 1:].transpose(0, 2, 1)


@table.kernel("causal_conv1d", when=WHEN, wants=WANTS)
def convolution(op: Op, x: Array, weight: Array, state: Array) -> tuple[Array, Array]:
    """Shifted products added block by block, activation included, so that each block stays in the cache."""
    taps = weight[:, 0]
    past = len(taps) - 1
    batch, seq, channels = x.shape
    silu = cast(_HasActivation, op).activation == "silu"
    out = np.empty(x.shape, x.dtype)
    head = min(past, seq)
    start = np.concatenate((state.transpose(0, 2, 1), x[:, :head]), axis=1)

    def run(item: tuple[int, int, int]) -> None:
        row, low, high = item
        source, first = (start, low) if low < head else (x, low - past)
        y = out[row, low:high]
        np.multiply(source[row, first : first + high - low], taps[0], out=y)
        for j in range(1, past + 1):
            y += source[row, first + j : first + j + high - low] * taps[j]
        if silu:
            y /= one_plus_exp_negative(y)

    step = max(1, BLOCK // channels)
    blocks = [(0, head)] * bool(head) + [(low, min(low + step, seq)) for low in range(head, seq, step)]
    pool().map(run, [(row, low, high) for row in range(batch) for low, high in blocks])
    recent = x[:, seq - past :].copy() if seq >= past else start[:, seq:]
    return out, recent.transpose(0, 2, 1)
