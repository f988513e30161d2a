"""The gated delta rule of the NumPy backend: one token in place, more tokens in chunks (Qwen3-Next specification, 5.3 to 5.5).

What makes the chunked rule fast: products of queries and keys once a *key* head, decays a value head; beta and the decays folded
into the columns of the triangular inverse, so that neither keys nor values are scaled; W and the decayed queries stacked, so
that the scan reads the state once a chunk; everything else one stacked product over (head, chunk). Scratch is bounded: a
thread holds at most ``MATRICES`` chunks of one value head at a time, whatever the length.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol, cast

import numpy as np

from deltaloom.backends.numpy.elementwise import logistic
from deltaloom.backends.numpy.table import table
from deltaloom.backends.numpy.threads import share, slices, team
from deltaloom.backends.numpy.triangular import unit_lower_inverse
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import dtype_in, size


class _HasScale(Protocol):
    scale: float


CHUNK = 16
"""Tokens a chunk. Against 64, which the reference library takes: 2.5 times faster for heads of 32, 1.25 for 128; work within a
chunk grows with its length, and its triangular inverse needs no merging of blocks."""

MATRICES = 128
"""Chunks, counted a value head, that are solved together: fewer cost calls, more leave the second-level cache."""

STEP_WORK = 1 << 19
"""State elements from which one token is worth two threads."""

WORK = 1 << 20
"""State elements times tokens from which chunks are worth two threads."""


@table.kernel("delta_gates", when=(dtype_in("b", f32, f64),))
def delta_gates(op: Op, b: Array, a: Array, a_log: Array, dt_bias: Array) -> tuple[Array, Array]:
    """softplus as max(x, 0) + log1p(exp(-|x|)): exact, and faster than logaddexp."""
    x = a + dt_bias
    small = np.abs(x)
    np.negative(small, out=small)
    np.exp(small, out=small)
    np.log1p(small, out=small)
    np.maximum(x, 0, out=x)
    x += small
    x *= -np.exp(a_log)
    return logistic(b), x


@table.kernel("gated_delta_rule", when=(size("q", 1, equals=1), dtype_in("v", f32, f64)))
def delta_step(op: Op, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """One token, in place."""
    batch, _, key_heads, key_dim = q.shape
    value_heads, value_dim = state.shape[1], state.shape[3]
    heads = (batch, key_heads, value_heads // key_heads)
    out = np.empty((*heads, value_dim), state.dtype)
    advance(
        out,
        (q * cast(_HasScale, op).scale).reshape(batch, key_heads, 1, key_dim),
        k.reshape(batch, key_heads, 1, key_dim),
        v.reshape(*heads, value_dim),
        np.exp(log_decay).reshape(*heads, 1),
        beta.reshape(*heads, 1),
        state.reshape(*heads, key_dim, value_dim),
        np.empty((*heads, key_dim, value_dim), state.dtype),
        np.empty((2, *heads, value_dim), state.dtype),
    )
    return out.reshape(v.shape).astype(v.dtype, copy=False), state


def advance(
    out: Array, queries: Array, keys: Array, values: Array, decay: Array, betas: Array, state: Array, outer: Array, pair: Array
) -> None:
    """One token of every head: out = g (q S) + (q k) delta with the *old* state, which is so read once and written once.

    queries (scaled), keys [batch, Hk, 1, dk]; values, out [batch, Hk, r, dv]; decay g, betas [batch, Hk, r, 1]; ``state`` is
    changed in place and ``outer`` is scratch, both [batch, Hk, r, dk, dv]; so is ``pair`` [2, batch, Hk, r, dv]."""

    def run(at: slice) -> None:
        query, key, old, g, update = queries[:, at], keys[:, at], state[:, at], decay[:, at], outer[:, at]
        delta, product = pair[:, :, at]
        np.vecmat(key, old, out=delta)
        delta *= g
        np.subtract(values[:, at], delta, out=delta)
        delta *= betas[:, at]
        part = np.vecmat(query, old, out=out[:, at])
        part *= g
        part += np.multiply(np.vecdot(query, key)[..., None], delta, out=product)
        old *= g[..., None]
        np.multiply(key[..., None], delta[..., None, :], out=update)
        old += update

    share(run, keys.shape[1], worth=state.size >= STEP_WORK)


@table.kernel("gated_delta_rule", when=(dtype_in("v", f32, f64),))
def delta_chunks(op: Op, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """Any number of tokens, in place, chunk by chunk; the threads share batch rows and groups of key heads."""
    scale = cast(_HasScale, op).scale
    batch, seq, key_heads, _ = q.shape
    repeats = v.shape[2] // key_heads
    out = np.empty(v.shape, state.dtype)
    chunks = max(1, min(MATRICES // repeats, seq // CHUNK))
    together = max(1, MATRICES // (chunks * repeats))
    threads = team(state.size * seq >= WORK)
    groups = max(-(-key_heads // together), min(threads.n, key_heads) if batch == 1 else 1)

    def run(item: tuple[int, slice]) -> None:
        row, keys = item
        values = slice(keys.start * repeats, keys.stop * repeats)
        inputs = (q[row, :, keys], k[row, :, keys], v[row, :, values], log_decay[row, :, values], beta[row, :, values])
        held = state[row, values]
        for start, stop, chunk in _segments(seq, chunks):
            _segment([x[start:stop] for x in inputs], held, out[row, start:stop, values], scale, chunk)

    threads.map(run, [(row, keys) for row in range(batch) for keys in slices(key_heads, groups)])
    return out.astype(v.dtype, copy=False), state


def _segments(seq: int, chunks: int) -> list[tuple[int, int, int]]:
    """``seq`` as (start, stop, chunk length): groups of whole chunks, then the rest as one chunk of its own length."""
    whole = seq // CHUNK * CHUNK
    found = [(at, min(at + chunks * CHUNK, whole), CHUNK) for at in range(0, whole, chunks * CHUNK)]
    return [*found, (whole, seq, seq - whole)] if whole < seq else found


@cache
def _above(chunk: int) -> Array:
    """0 on and below the diagonal, -inf above: added before exp, it masks."""
    return np.triu(np.full((chunk, chunk), -np.inf, np.float32), 1)


def _segment(inputs: list[Array], state: Array, out: Array, scale: float, chunk: int) -> None:
    """Some whole chunks of a group of heads. ``inputs``: q, k [rows, Hk, dk], v [rows, Hv, dv], log_decay, beta [rows, Hv]; state
    [Hv, dk, dv] is updated in place; ``out`` [rows, Hv, dv]."""
    n, dtype = len(out) // chunk, state.dtype
    q, k, v, log_decay, beta = inputs
    key_heads, key_dim = k.shape[1:]
    value_heads, value_dim = v.shape[1:]
    repeats = value_heads // key_heads
    lead = (key_heads, repeats, n)

    both = np.empty((key_heads, n, 2, chunk, key_dim), dtype)
    both[:, :, 0] = k.reshape(n, chunk, key_heads, key_dim).transpose(2, 0, 1, 3)
    np.multiply(q.reshape(n, chunk, key_heads, key_dim).transpose(2, 0, 1, 3), scale, out=both[:, :, 1])
    keys, queries = both[:, :, 0], both[:, :, 1]
    values = v.reshape(n, chunk, key_heads, repeats, value_dim).transpose(2, 3, 0, 1, 4)
    # Copies: what is computed from a transposed view keeps its order of axes, and then every product has strided operands.
    betas, decays = (np.ascontiguousarray(x.reshape(n, chunk, key_heads, repeats).transpose(2, 3, 0, 1)) for x in (beta, log_decay))

    # Sums of decays reach thousands and their differences matter to 1e-7: float64 until the exponential.
    total = decays.cumsum(axis=-1, dtype=np.float64)
    decay = np.subtract(total[..., :, None], total[..., None, :]).astype(dtype)
    decay += _above(chunk)
    np.exp(decay, out=decay)
    grown = np.exp(total).astype(dtype)
    shrinking = np.exp(total[..., -1:] - total).astype(dtype)

    products = both.reshape(key_heads, n, 2 * chunk, key_dim) @ keys.swapaxes(-1, -2)
    lower, scores = (products[:, None, :, at : at + chunk] * decay for at in (0, chunk))
    lower *= betas[..., None]
    inverse = unit_lower_inverse(lower.reshape(-1, chunk, chunk)).reshape(lower.shape)
    inverse *= betas[..., None, :]
    new_values = inverse @ values
    inverse *= grown[..., None, :]
    readers = np.empty((*lead, 2, chunk, key_dim), dtype)
    np.matmul(inverse, keys[:, None], out=readers[..., 0, :, :])
    np.multiply(queries[:, None], grown[..., None], out=readers[..., 1, :, :])
    readers = readers.reshape(*lead, 2 * chunk, key_dim)
    writers = keys.swapaxes(-1, -2)[:, None] * shrinking[..., None, :]

    held = state.reshape(key_heads, repeats, key_dim, value_dim)
    read = _scan(readers, writers, new_values, grown[..., -1, None, None], held)
    answers = scores @ new_values
    answers += read[..., chunk:, :]
    by_token = answers.transpose(2, 3, 0, 1, 4)
    out.reshape(by_token.shape)[...] = by_token


def _scan(readers: Array, writers: Array, new_values: Array, grown: Array, held: Array) -> Array:
    """Chunk by chunk: read = readers S, new_values -= its first half, S = grown S + writers new_values. Gives all reads.

    readers [Hk, r, n, 2 C, dk], writers [Hk, r, n, dk, C], new_values [Hk, r, n, C, dv] and the state held [Hk, r, dk, dv],
    which are changed in place; grown [Hk, r, n, 1, 1]. (From state to state, S = (grown - writers W) S + writers U, is two calls
    a chunk but no faster, for heads of 32 either.)"""
    chunk = new_values.shape[-2]
    read = np.empty((*readers.shape[:-1], held.shape[-1]), held.dtype)
    for i in range(readers.shape[2]):
        np.matmul(readers[:, :, i], held, out=read[:, :, i])
        new_values[:, :, i] -= read[:, :, i, :chunk]
        held *= grown[:, :, i]
        held += writers[:, :, i] @ new_values[:, :, i]
    return read
