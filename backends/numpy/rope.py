"""What comes before attention in the NumPy backend: heads cut, normed and rotated (Qwen3-Next specification, sections 6 and 7).

A rotation is ``x * [cos, cos] + swap(x) * [-sin, sin]`` with the halves of x swapped: three calls a tensor.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import cast

import numpy as np

from deltaloom.backends.numpy.norm import normalise_into
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import pool
from deltaloom.graph.ir import Node
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import TensorType, f32, f64
from deltaloom.ops.fused_attention import QKVNormRope
from deltaloom.ops.rope import RotaryEmbedding
from deltaloom.passes.kernel import dtype_in, input_type

BLOCK = 1 << 15
"""Elements of ``projected`` that are cut, normed and rotated at once."""


def _in_float32(node: Node) -> str | None:
    dtype = cast(RotaryEmbedding, node.op).dtype
    return None if dtype == "float32" else f"gives {dtype}, not float32"


@cache
def _frequencies(inv_freq: tuple[float, ...]) -> Array:
    return np.asarray(inv_freq, np.float32)


def _rotate(x: Array, cos: Array, signed_sin: Array, out: Array | None) -> None:
    """Rotate the first elements of x [tokens, heads, width] in place; cos [tokens, 1, 1, half], signed_sin [tokens, 1, 2, half];
    ``out`` [tokens, at least heads, 2, half] is scratch."""
    half = cos.shape[-1]
    turned = x[..., : 2 * half].reshape(*x.shape[:-1], 2, half)
    swapped = np.multiply(turned[..., ::-1, :], signed_sin, out=None if out is None else out[:, : x.shape[1]])
    turned *= cos
    turned += swapped


def _angles(cos: Array, sin: Array) -> tuple[Array, Array]:
    """``cos`` and ``[-sin, sin]`` for ``_rotate``."""
    signed = np.empty((*sin.shape[:-1], 1, 2, sin.shape[-1]), sin.dtype)
    np.negative(sin, out=signed[..., 0, 0, :])
    signed[..., 0, 1, :] = sin
    return cos[..., None, None, :], signed


def _scratch(node: Node) -> tuple[TensorType, ...]:
    """The rotated part of the queries with its halves swapped."""
    op, projected, cos = cast(QKVNormRope, node.op), input_type(node, "projected"), input_type(node, "cos")
    tokens = projected.shape[0] * projected.shape[1]
    return (TensorType(projected.dtype, (tokens, max(op.heads, op.kv_heads), 2, cos.shape[-1])),)


@table.kernel("qkv_norm_rope", when=(dtype_in("projected", f32, f64),), into=True, scratch=_scratch)
def qkv_norm_rope(
    op: Op,
    projected: Array,
    q_weight: Array,
    k_weight: Array,
    cos: Array,
    sin: Array,
    *,
    out: tuple[Array, ...] | None = None,
    scratch: tuple[Array] | None = None,
) -> tuple[Array, ...]:
    """Blocks of tokens, shared by the threads. Without ``out``, v and the gate are views."""
    fused = cast(QKVNormRope, op)
    batch, seq, columns = projected.shape
    tokens, width = batch * seq, len(q_weight)
    rows = projected.reshape(tokens, columns)
    ends = list(accumulate(fused.sizes(width)))
    pieces = [rows[:, start:end] for start, end in zip([0, *ends], ends)]
    shapes = [(batch, seq, heads, width) for heads in (fused.heads, fused.kv_heads)]
    q, k = out[:2] if out else (np.empty(shape, projected.dtype) for shape in shapes)
    c, s = _angles(cos.reshape(tokens, -1), sin.reshape(tokens, -1))
    parts = [
        (target.reshape(tokens, -1, width), source.reshape(tokens, -1, width), weight)
        for target, source, weight in ((q, pieces[0], q_weight), (k, pieces[-2], k_weight))
    ]

    def run(at: slice) -> None:
        for target, source, weight in parts:
            piece = target[at]
            normalise_into(piece, source[at], width, fused.eps)
            piece *= weight
            _rotate(piece, c[at], s[at], scratch and scratch[0][at])

    if rows.size <= 2 * BLOCK:
        run(slice(0, tokens))
    else:
        step = max(1, BLOCK // columns)
        pool().map(run, [slice(start, start + step) for start in range(0, tokens, step)])
    v = pieces[-1].reshape(batch, seq, fused.kv_heads, width)
    rest = (v, pieces[1].reshape(batch, seq, -1)) if fused.gated else (v,)
    if out:
        for target, source in zip(out[2:], rest, strict=True):
            target[...] = source
        return out
    return q, k, *rest


@table.kernel("rotary_embedding", when=(_in_float32,))
def rotary_embedding(op: Op, positions: Array) -> tuple[Array, Array]:
    """In float32 throughout: cosines of the same float32 angles, half the time of the reference's float64."""
    rotary = cast(RotaryEmbedding, op)
    angles = positions.astype(np.float32)[..., None] * _frequencies(rotary.inv_freq)
    cos, sin = np.cos(angles), np.sin(angles)
    if rotary.magnitude != 1:
        cos *= np.float32(rotary.magnitude)
        sin *= np.float32(rotary.magnitude)
    return cos, sin
