"""One token of the gated delta net, in one pass over each head's state."""

from __future__ import annotations

from typing import cast

import numpy as np

from deltaloom.backends.numpy.delta_rule import STEP_WORK
from deltaloom.backends.numpy.threads import share
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32
from deltaloom.ops.fused_delta_net import GatedDeltaNet
from deltaloom.passes.kernel import dtype_in, is_param, size
from deltaloom_numba.loops import delta_net_step as advance
from deltaloom_numba.table import table


@table.kernel(
    "gated_delta_net",
    when=(size("projected", 1, equals=1), dtype_in("projected", f32), is_param("conv_weight")),
    wants={"conv_weight": (2, 1, 0)},
    into=True,
)
def delta_net_step(
    op: Op,
    projected: Array,
    conv_weight: Array,
    a_log: Array,
    dt_bias: Array,
    norm_weight: Array,
    conv: Array,
    delta: Array,
    *,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Both states are changed in place; that of the convolution is kept taps first from the first token on, as the NumPy backend
    does. The threads share the key heads."""
    net = cast(GatedDeltaNet, op)
    batch, values = len(projected), net.value_heads * net.value_dim
    result = np.empty((batch, 1, values), np.float32) if out is None else out
    held, state = np.ascontiguousarray(conv.transpose(0, 2, 1)), np.ascontiguousarray(delta)
    given = np.ascontiguousarray(projected.reshape(batch, -1))
    taps, target, settings = conv_weight[:, 0], result.reshape(batch, -1), (net.scale, net.l2_eps, net.eps)

    def run(part: slice) -> None:
        span = part.start, part.stop
        advance(given, taps, a_log, dt_bias, norm_weight, held, state, target, settings, net.key_heads, *span)

    share(run, batch * net.key_heads, worth=delta.size >= STEP_WORK)
    return result, held.transpose(0, 2, 1), state
