"""Kimi Delta Attention for the NumPy backend: one token in place, more tokens in chunks, normalised on the way if asked for.

The chunked form needs, for every pair j <= i of a chunk, the product of the channels' decays between the two, which no matrix
product gives at once; and dividing exp(G[i]) by exp(G[j]) overflows. So a chunk is built up from blocks that double: with P the
decays from a block's start to i and R those from j to its end, the pairs of two neighbouring blocks are (P[i] k[i]) . (R[j] k[j]).
Every factor is a product of decays, so at most 1: nothing overflows, and one exponential an element is enough.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltaloom.backends.numpy.threads import share, slices, team
from deltaloom.backends.numpy.triangular import unit_lower_inverse
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import f32, f64
from deltaloom.passes.kernel import KernelTable, dtype_in, size
from deltaloom_kda.delta_attention import DeltaAttention, NormedDeltaAttention

table = KernelTable("numpy")

CHUNK = 16
"""Tokens a chunk, a power of two: the cost of the triangular inverse grows with it, that of the scan shrinks."""

MATRICES = 128
"""Chunks that are solved together: fewer cost calls, more leave the second-level cache."""

STEP_WORK = 1 << 19
"""State elements from which one token is worth two threads."""

WORK = 1 << 20
"""State elements times tokens from which chunks are worth two threads."""

ONE_TOKEN = size("v", 1, equals=1)
VALUES = dtype_in("v", f32, f64)
PLAIN = tuple(dtype_in(name, f32, f64) for name in ("q", "k", "v"))


@table.kernel("kda.decay", when=(dtype_in("a", f32, f64),))
def decay(op: Op, a: Array, a_log: Array, dt_bias: Array) -> Array:
    """softplus as max(x, 0) + log1p(exp(-|x|)): exact, and faster than logaddexp."""
    x = a + dt_bias
    small = np.abs(x)
    np.negative(small, out=small)
    np.log1p(np.exp(small, out=small), out=small)
    np.maximum(x, 0, out=x)
    x += small
    x *= -np.exp(a_log)[:, None]
    return x


@table.kernel("kda.delta_attention", when=(ONE_TOKEN, VALUES))
def attention_step(
    op: DeltaAttention, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
) -> tuple[Array, Array]:
    """One token, in place."""
    pair = np.concatenate((q, k), axis=1)
    pair[:, 0] *= op.scale
    return _step(pair, v, log_decay, beta, state), state


@table.kernel("kda.normed_delta_attention", when=(ONE_TOKEN, *PLAIN))
def normed_step(
    op: NormedDeltaAttention, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
) -> tuple[Array, Array]:
    """One token, in place."""
    pair = np.concatenate((q, k), axis=1)
    lengths = np.vecdot(pair, pair)
    lengths += op.eps
    pair /= np.sqrt(lengths, out=lengths)[..., None]
    pair[:, 0] *= op.scale
    return _step(pair, v, log_decay, beta, state), state


def _step(pair: Array, v: Array, log_decay: Array, beta: Array, state: Array) -> Array:
    """out [batch, 1, heads, dv] = (a q) S + (q k) delta with the *old* state, which is so read once and written once; ``pair``
    [batch, 2, heads, dk] is q, scaled, and k; the decays are a = exp(log_decay)."""
    out = np.empty_like(v)
    decays, betas = np.exp(log_decay), beta[..., None]

    def run(at: slice) -> None:
        both, fade, old = pair[:, :, at], decays[:, :, at], state[:, at]
        read = np.vecmat(both * fade, old[:, None])
        delta = v[:, 0, at] - read[:, 1]
        delta *= betas[:, 0, at]
        products = np.vecdot(both[:, 0], both[:, 1])[..., None] * delta
        np.add(read[:, 0], products, out=out[:, 0, at])
        old *= fade[:, 0, :, :, None]
        old += both[:, 1, :, :, None] * delta[..., None, :]

    share(run, v.shape[2], worth=state.size >= STEP_WORK)
    return out


@table.kernel("kda.delta_attention", when=(VALUES,))
def attention_chunks(
    op: DeltaAttention, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
) -> tuple[Array, Array]:
    """Any number of tokens, in place, chunk by chunk; the threads share batch rows and groups of heads."""
    scale = op.scale

    def prepared(queries: Array, keys: Array) -> None:
        queries *= scale

    return _chunked(prepared, q, k, v, log_decay, beta, state), state


@table.kernel("kda.normed_delta_attention", when=PLAIN)
def normed_chunks(
    op: NormedDeltaAttention, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
) -> tuple[Array, Array]:
    """Any number of tokens, in place, chunk by chunk."""
    scale, eps = op.scale, op.eps

    def prepared(queries: Array, keys: Array) -> None:
        queries *= scale / np.sqrt(np.vecdot(queries, queries) + eps)[..., None]
        keys /= np.sqrt(np.vecdot(keys, keys) + eps)[..., None]

    return _chunked(prepared, q, k, v, log_decay, beta, state), state


Prepare = Callable[[Array, Array], None]
"""Changes copies of queries and keys [heads, chunks, CHUNK, dk] in place."""


def _chunked(prepare: Prepare, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array) -> Array:
    batch, seq, heads, _ = k.shape
    out = np.empty_like(v)
    chunks = max(1, min(MATRICES, -(-seq // CHUNK)))
    threads = team(state.size * seq >= WORK)
    together = max(1, MATRICES // chunks)
    groups = max(-(-heads // together), min(threads.n, heads) if batch == 1 else 1)

    def run(item: tuple[int, slice]) -> None:
        row, at = item
        for start in range(0, seq, chunks * CHUNK):
            part = slice(start, start + chunks * CHUNK)
            inputs = [x[row, part, at] for x in (q, k, v, log_decay, beta[..., None])]
            _segment(prepare, inputs, state[row, at], out[row, part, at])

    threads.map(run, [(row, at) for row in range(batch) for at in slices(heads, groups)])
    return out


def _segment(prepare: Prepare, inputs: list[Array], state: Array, out: Array) -> None:
    """Some chunks of a group of heads. ``inputs``: q, k, v, log_decay, beta [rows, heads, width]; state [heads, dk, dv] is updated
    in place; ``out`` [rows, heads, dv]."""
    rows = len(out)
    count = -(-rows // CHUNK)
    dk = state.shape[1]
    queries, keys, values, log_decay, betas = (_by_chunk(x, count) for x in inputs)
    prepare(queries, keys)

    lower, scores, since_start, until_end = _products(queries, keys, np.exp(log_decay, out=log_decay))
    lower *= betas
    inverse = unit_lower_inverse(lower.reshape(-1, CHUNK, CHUNK)).reshape(lower.shape)
    inverse *= betas.swapaxes(-1, -2)
    new = inverse @ values
    readers = np.empty((len(state), count, 2 * CHUNK, dk), state.dtype)
    np.matmul(inverse, since_start * keys, out=readers[..., :CHUNK, :])
    np.multiply(since_start, queries, out=readers[..., CHUNK:, :])
    until_end *= keys
    writers = until_end.swapaxes(-1, -2)
    whole = since_start[:, :, -1, :, None]
    read = np.empty((len(state), count, 2 * CHUNK, state.shape[2]), state.dtype)
    for i in range(count):
        np.matmul(readers[:, i], state, out=read[:, i])
        new[:, i] -= read[:, i, :CHUNK]
        state *= whole[:, i]
        state += writers[:, i] @ new[:, i]
    answers = scores @ new
    answers += read[..., CHUNK:, :]
    out[...] = answers.transpose(1, 2, 0, 3).reshape(count * CHUNK, *out.shape[1:])[:rows]


def _by_chunk(x: Array, count: int) -> Array:
    """[rows, heads, width] -> a copy [heads, count, CHUNK, width], filled with zeros, which change nothing."""
    filled = np.zeros((x.shape[1], count * CHUNK, x.shape[2]), x.dtype)
    filled[:, : len(x)] = x.swapaxes(0, 1)
    return filled.reshape(x.shape[1], count, CHUNK, x.shape[2])


def _products(queries: Array, keys: Array, decay: Array) -> tuple[Array, Array, Array, Array]:
    """Of every pair of positions j < i, and for the scores j <= i too, the products of k[i] and of q[i] with k[j], decayed:
    [heads, count, CHUNK, CHUNK], zeros above; then each position's decays since its chunk's start, its own among them, and
    until its end, [heads, count, CHUNK, dk]. ``decay`` is changed in place."""
    heads, count, _, dk = keys.shape
    matrices = np.zeros((2, heads, count, CHUNK, CHUNK), keys.dtype)
    since_start, until_end = decay, np.ones_like(decay)
    np.einsum("hnii->hni", matrices[1])[...] = np.vecdot(queries, keys)
    half = 1
    while half < CHUNK:
        pairs = (heads, count, CHUNK // (2 * half), 2, half)
        first, second = (until_end.reshape(*pairs, dk)[:, :, :, 0], since_start.reshape(*pairs, dk)[:, :, :, 1])
        columns = (first * keys.reshape(*pairs, dk)[:, :, :, 0]).swapaxes(-1, -2)
        blocks = matrices.reshape(2, *pairs, CHUNK // (2 * half), 2, half)
        for rows, block in zip((keys, queries), blocks):
            # The blocks below the diagonal: rows of the second half of a pair, columns of its first.
            np.einsum("hnpipj->hnpij", block[:, :, :, 1, :, :, 0])[...] = (second * rows.reshape(*pairs, dk)[:, :, :, 1]) @ columns
        whole = since_start.reshape(*pairs, dk)[:, :, :, :, -1:].copy()
        second *= whole[:, :, :, 0]
        first *= whole[:, :, :, 1]
        half *= 2
    return matrices[0], matrices[1], since_start, until_end
