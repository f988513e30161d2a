"""The gated delta net of the NumPy backend, one token in one kernel (Qwen3-Next specification, section 5).

For a small model a token is made of calls, not of arithmetic: this is the whole mixer in about forty. What lies side by side in
the packed projection is worked on at once: the norms of q and k, the silu of the convolution and of the gate z.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from deltaloom.backends.numpy.delta_rule import advance
from deltaloom.backends.numpy.elementwise import logistic, silu_into
from deltaloom.backends.numpy.table import table
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import TensorType, f32, f64
from deltaloom.ops.fused_delta_net import GatedDeltaNet
from deltaloom.passes.kernel import dtype_in, input_type, is_param, size


def _scratch(node: Node) -> tuple[TensorType, ...]:
    """The window of the convolution, its result beside z before and after silu, the update of the state, and two rows as its
    values."""
    op = cast(GatedDeltaNet, node.op)
    projected, weight = input_type(node, "projected"), input_type(node, "conv_weight")
    batch, dtype, (channels, _, taps) = projected.shape[0], projected.dtype, weight.shape
    mixed = TensorType(dtype, (batch, channels + op.widths[1]))
    pair = TensorType(dtype, (2, batch, op.widths[1]))
    return TensorType(dtype, (batch, taps, channels)), mixed, mixed, input_type(node, "delta"), pair


@table.kernel(
    "gated_delta_net",
    when=(size("projected", 1, equals=1), dtype_in("projected", f32, f64), is_param("conv_weight")),
    wants={"conv_weight": (2, 1, 0)},
    into=True,
    scratch=_scratch,
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
    scratch: tuple[Array, Array, Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """One token: convolution, norms, gates, the rule and the gated norm; both states are changed in place."""
    net = cast(GatedDeltaNet, op)
    batch, dtype = len(projected), projected.dtype
    key_width, value_width = net.widths
    channels, value_heads = 2 * key_width + value_width, net.value_heads
    window, plain, mixed, outer, pair = scratch or (
        np.empty((batch, len(conv_weight), channels), dtype),
        np.empty((batch, channels + value_width), dtype),
        np.empty((batch, channels + value_width), dtype),
        np.empty(delta.shape, dtype),
        np.empty((2, batch, value_width), dtype),
    )
    result = np.empty((batch, 1, value_width), dtype) if out is None else out
    row = projected.reshape(batch, -1)

    conv = _convolve(plain[:, :channels], row[:, :channels], conv_weight[:, 0], conv, window)
    plain[:, channels:] = row[:, channels : channels + value_width]
    silu_into(mixed, plain)

    both = mixed[:, : 2 * key_width].reshape(batch, 2, net.key_heads, net.key_dim)
    lengths = np.vecdot(both, both)
    lengths += net.l2_eps
    np.sqrt(lengths, out=lengths)
    lengths[:, 0] *= 1 / net.scale
    np.divide(both, lengths[..., None], out=both)

    beta, decay = _gates(row[:, channels + value_width :], a_log, dt_bias)
    heads = (batch, net.key_heads, value_heads // net.key_heads)
    held = delta.reshape(*heads, net.key_dim, net.value_dim)
    answer = result.reshape(*heads, net.value_dim)
    values = mixed[:, 2 * key_width : channels].reshape(*heads, net.value_dim)
    queries, keys = both[:, 0, :, None], both[:, 1, :, None]
    factors = decay.reshape(*heads, 1), beta.reshape(*heads, 1)
    advance(answer, queries, keys, values, *factors, held, outer.reshape(held.shape), pair.reshape(2, *answer.shape))

    root = np.vecdot(answer, answer)
    root *= 1 / net.value_dim
    root += net.eps
    np.sqrt(root, out=root)
    answer /= root[..., None]
    answer *= norm_weight
    answer *= mixed[:, channels:].reshape(answer.shape)
    return result, conv, delta


def _convolve(out: Array, column: Array, taps: Array, state: Array, window: Array) -> Array:
    """``out`` [batch, C] of the new ``column`` [batch, C] and ``taps`` [K, C]; gives the new state [batch, C, K - 1], which is
    kept taps first from the first token on."""
    held = state.transpose(0, 2, 1)
    if not held.flags.c_contiguous:
        held = np.ascontiguousarray(held)
    np.concatenate((held, column[:, None]), axis=1, out=window)
    held[...] = window[:, 1:]
    window *= taps
    np.add.reduce(window, axis=1, out=out)
    return held.transpose(0, 2, 1)


def _gates(b_a: Array, a_log: Array, dt_bias: Array) -> tuple[Array, Array]:
    """beta and exp(log_decay), [batch, Hv] each. A few numbers: ``logaddexp`` is one call."""
    heads = len(a_log)
    softplus = np.logaddexp(0, b_a[:, heads:] + dt_bias)
    softplus *= -np.exp(a_log)
    return logistic(b_a[:, :heads]), np.exp(softplus, out=softplus)
