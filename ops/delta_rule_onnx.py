"""The gated delta rule in ONNX: token by token for few of them, else in chunks (see ``chunked_delta_rule`` for the algebra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaloom.graph.types import f32, f64, i64

FEW = 4
"""Up to so many positions the recurrence is quicker."""
CHUNK = 16
"""Positions that are solved together; a power of two."""


def gated_delta_rule(b: Any, q: str, k: str, v: str, log_decay: str, beta: str, state: str) -> tuple[str, str]:
    """Arguments and results as ``GatedDeltaRule.reference``; the scale is the op's attribute ``scale``."""
    heads, repeats = b.type(v).shape[2], b.type(v).shape[2] // b.type(k).shape[2]
    batch, seq = b.size(v, 0), b.size(v, 1)

    def repeated(b: Any, x: str) -> str:
        width = b.type(x).shape[3]
        spread = b.Tile(b.Unsqueeze(x, b.ints(3)), b.ints(1, 1, 1, repeats, 1))
        found: str = b.reshape(spread, batch, seq, heads, width) if repeats > 1 else x
        return found

    if b.has("LinearAttention") and b.dtypes[v] == f32:
        return _whole(b, (repeated(b, q), repeated(b, k), v), log_decay, beta, state)
    queries, keys = b.Mul(repeated(b, q), b.attribute("scale")), repeated(b, k)
    inputs = (queries, keys, b.wide(v), log_decay, beta)
    few = b.LessOrEqual(b.scalar(seq), b.constant(FEW, i64))
    made = b.branch(
        few, lambda b: _recurrent(b, *inputs, state), lambda b: _chunked(b, *inputs, state, seq), b.kind(state, 4), b.kind(state, 4)
    )
    out, new_state = made
    return b.narrow(out, v), new_state


def _whole(b: Any, values: Sequence[str], log_decay: str, beta: str, state: str) -> tuple[str, str]:
    """With the one op for it, which wants heads side by side."""
    heads, width = b.type(state).shape[1], b.type(state).shape[3]
    batch, seq = b.size(log_decay, 0), b.size(log_decay, 1)
    flat = [b.reshape(x, batch, seq, -1) for x in values]
    out, new_state = b.newer(
        "LinearAttention", *flat, state, log_decay, beta, q_num_heads=heads, kv_num_heads=heads, update_rule="gated_delta",
        scale=b.reference("scale"), outputs=2,
    )  # fmt: skip
    return b.reshape(out, batch, seq, heads, width), new_state


def _recurrent(b: Any, q: str, k: str, v: str, log_decay: str, beta: str, state: str) -> tuple[str, str]:
    def step(b: Any, s: str, q: str, k: str, v: str, decay: str, beta: str) -> tuple[str, str]:
        s = b.Mul(s, b.Unsqueeze(b.Exp(decay), b.ints(2, 3)))
        row = b.Unsqueeze(k, b.ints(2))
        error = b.Mul(b.Sub(b.Unsqueeze(v, b.ints(2)), b.MatMul(row, s)), b.Unsqueeze(beta, b.ints(2, 3)))
        s = b.Add(s, b.MatMul(b.Unsqueeze(k, b.ints(3)), error))
        return s, b.Squeeze(b.MatMul(b.Unsqueeze(q, b.ints(2)), s), b.ints(2))

    rows = [(b.Transpose(x, perm=[1, 0, 2, 3]), b.kind(x, 3)) for x in (q, k, v)]
    gates = [(b.Transpose(x, perm=[1, 0, 2]), b.kind(x, 2)) for x in (log_decay, beta)]
    last, out = b.scan(step, states=[(state, b.kind(state, 4))], sequences=[*rows, *gates], outputs=[b.kind(v, 3)])
    return b.Transpose(out, perm=[1, 0, 2, 3]), last


def _chunked(b: Any, q: str, k: str, v: str, log_decay: str, beta: str, state: str, seq: str) -> tuple[str, str]:
    pads = b.Concat(b.ints(0), b.Mod(b.Neg(seq), b.ints(CHUNK)), axis=0)

    def chunks(x: str, width: int) -> str:
        """[batch, seq, heads, width] -> [chunks, batch, heads, CHUNK, width], filled with zeros."""
        filled = b.Pad(x, pads, b.like(0.0, x), b.ints(1))
        cut = b.Reshape(filled, b.ints(0, -1, CHUNK, b.type("v").shape[2], width), allowzero=0)
        found: str = b.Transpose(cut, perm=[1, 0, 3, 2, 4])
        return found

    dk, dv = b.type("k").shape[3], b.type("v").shape[3]
    queries, keys, values = chunks(q, dk), chunks(k, dk), chunks(v, dv)
    decays, betas = (chunks(b.Unsqueeze(x, b.ints(3)), 1) for x in (log_decay, beta))

    def turned(x: str) -> str:
        found: str = b.Transpose(x, perm=[0, 1, 2, 4, 3])
        return found

    # The sums are large and their differences matter: in float64.
    total = b.CumSum(b.cast(decays, f64), b.constant(3, i64))
    last = b.slice(total, 3, CHUNK - 1)
    lower = np.tril(np.ones((CHUNK, CHUNK)))
    above = b.constant(np.where(lower, 0, -np.inf), f64)
    decay = b.cast(b.Exp(b.Add(b.Sub(total, turned(total)), above)), f32)
    since_start, until_end, whole = (b.cast(b.Exp(x), f32) for x in (total, b.Sub(last, total), last))
    strict = b.Mul(b.Mul(betas, b.Mul(b.MatMul(keys, turned(keys)), decay)), b.constant(np.tril(lower, -1)))
    solve = _inverse(b, strict)
    u = b.MatMul(solve, b.Mul(betas, values))
    w = b.MatMul(solve, b.Mul(b.Mul(betas, since_start), keys))
    scores = b.Mul(b.MatMul(queries, turned(keys)), decay)

    def step(b: Any, s: str, u: str, w: str, q: str, scores: str, k: str, whole: str) -> tuple[str, str]:
        new = b.Sub(u, b.MatMul(w, s))
        out = b.Add(b.MatMul(q, s), b.MatMul(scores, new))
        return b.Add(b.Mul(whole, s), b.MatMul(k, new)), out

    given = (u, w, b.Mul(since_start, queries), scores, turned(b.Mul(until_end, keys)), whole)
    sequences = [(x, b.kind(x, 4)) for x in given]
    final, out = b.scan(step, states=[(state, b.kind(state, 4))], sequences=sequences, outputs=[b.kind(v, 4)])
    joined = b.Reshape(b.Transpose(out, perm=[1, 0, 3, 2, 4]), b.ints(0, -1, b.type("v").shape[2], dv))
    return b.slice(joined, 1, 0, seq), final


def _inverse(b: Any, strict: str) -> str:
    """(I + A)^-1 of strictly lower triangular A by doubling blocks: X -= X A_w X, where A_w are the lower left w by w blocks of
    A's blocks of 2 w. Powers of A, as a product of (I + A^(2^i)) would need, grow without bound where keys are nearly equal."""
    row, column = np.indices((CHUNK, CHUNK))
    found, size = "", 1
    while size < CHUNK:
        same = row // (2 * size) == column // (2 * size)
        corner = same & (row // size % 2 == 1) & (column // size % 2 == 0)
        part = b.Mul(strict, b.constant(corner))
        found = b.Sub(b.constant(np.eye(CHUNK)), part) if size == 1 else b.Sub(found, b.MatMul(b.MatMul(found, part), found))
        size *= 2
    return found
