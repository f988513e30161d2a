"""The gated delta rule, recurrent (the definition) and chunked (Qwen3-Next specification, sections 5.4 and 5.5).

The chunked form is the WY representation of Yang, Wang, Zhang, Shen, Kim, "Parallelizing linear transformers with the
delta rule over sequence length" (NeurIPS 2024), with the decays of Yang, Kautz, Hatamizadeh, "Gated delta networks"
(ICLR 2025).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops import delta_rule_onnx
from deltaloom.ops.laws import ChunkInvariant, PaddingIsNoOp, PermutationEquivariant, Streaming
from deltaloom.ops.precision import wide, wide_dtype
from deltaloom.ops.signature import Axes, floating, has_dtype

CHUNK = 64
"""Positions that are solved together; results differ by rounding only."""


class GatedDeltaRule(Op):
    """S = exp(log_decay) S; S += k (beta (v - S^T k))^T; out = S^T (scale q), position by position, all in float32.

    q, k [batch, seq, Hk, dk] come normalised by ``l2_norm``; v [batch, seq, Hv, dv] in the model dtype, to which out is
    rounded; value head h uses key head h // (Hv / Hk); state S [batch, Hv, dk, dv]. q, k, log_decay, beta and state are
    float32 (float64 if v is)."""

    name: ClassVar[str] = "gated_delta_rule"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_state")
    updates: ClassVar[dict[str, int]] = {"state": 1}
    sharding: ClassVar[str] = (
        "b s! h k!, b s! h k!, b s! (h r) v, b s! (h r), b s! (h r), b (h r) k! v -> b s! (h r) v, b (h r) k! v"
    )
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("q", "k", "v", "log_decay", "beta")),
        PaddingIsNoOp(("q", "k", "v", "log_decay", "beta"), zero=("log_decay", "beta")),
        ChunkInvariant(),
        PermutationEquivariant(("q", "k", "v", "log_decay", "beta", "state")),
    )
    scale: float

    def infer(
        self, q: TensorType, k: TensorType, v: TensorType, log_decay: TensorType, beta: TensorType, state: TensorType
    ) -> tuple[TensorType, TensorType]:
        axes = Axes()
        axes.bind("q", q, "batch seq key_heads key_dim")
        axes.bind("k", k, "batch seq key_heads key_dim")
        axes.bind("v", v, "batch seq value_heads value_dim")
        axes.bind("log_decay", log_decay, "batch seq value_heads")
        axes.bind("beta", beta, "batch seq value_heads")
        axes.bind("state", state, "batch value_heads key_dim value_dim")
        key_heads, value_heads = axes.number("key_heads"), axes.number("value_heads")
        require(value_heads % key_heads == 0, f"the heads of v {v} are not a multiple of those of k {k}")
        dtype = wide_dtype(floating("v", v))
        for name, type_ in (("q", q), ("k", k), ("log_decay", log_decay), ("beta", beta), ("state", state)):
            has_dtype(name, type_, dtype, f"for v {v}")
        return v, state

    def reference(
        self, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
    ) -> tuple[Array, Array]:
        repeats = v.shape[2] // k.shape[2]
        q, k, values = q.repeat(repeats, axis=2), k.repeat(repeats, axis=2), wide(v)
        out = []
        for t in range(v.shape[1]):
            state = np.exp(log_decay[:, t, :, None, None]) * state
            error = values[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
            out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t] * self.scale))
        return np.stack(out, axis=1).astype(v.dtype), state

    def chunked(
        self, chunk: int, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array
    ) -> tuple[Array, Array]:
        """The same, ``chunk`` positions at a time."""
        return chunked_delta_rule(q, k, v, log_decay, beta, state, self.scale, chunk)

    def torch(self, torch: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
        repeats = v.shape[2] // k.shape[2]
        q = (q * self.scale).repeat_interleave(repeats, dim=2)
        k = k.repeat_interleave(repeats, dim=2)
        rule = _torch_step if v.shape[1] == 1 else _torch_chunked
        out, new_state = rule(torch, q, k, v.to(state.dtype), log_decay, beta, state)
        return out.to(v.dtype), new_state

    def onnx(self, b: Any, q: str, k: str, v: str, log_decay: str, beta: str, state: str) -> Any:
        return delta_rule_onnx.gated_delta_rule(b, q, k, v, log_decay, beta, state)

    def cost(
        self, q: TensorType, k: TensorType, v: TensorType, log_decay: TensorType, beta: TensorType, state: TensorType
    ) -> Cost:
        """Of the recurrent form: three products with the state and its decay, a position."""
        return Cost(7 * v.shape[1] * state.elements(), self.moved_bytes(q, k, v, log_decay, beta, state))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        batch, seq = draw.integer(1, 3), draw.choice(1, 2, 3, 5, 13, 63, 64, 65, 100, 130)
        key_heads, repeats = draw.integer(1, 4), draw.integer(1, 3)
        key_dim, value_dim = draw.size(17), draw.size(17)
        value_heads = key_heads * repeats
        q, k = (_unit(draw.normal(batch, seq, key_heads, key_dim)) for _ in range(2))
        if draw.choice(False, True):
            k = np.broadcast_to(k[:, :1], k.shape).copy()
        v = draw.uniform(-0.3, 5.0, batch, seq, value_heads, value_dim) * draw.choice(1.0, 16.0)
        gate = (batch, seq, value_heads)
        log_decay = draw.uniform(-2.0, 0.0, *gate) * draw.choice(1.0, 10.0, 0.0)
        log_decay = draw.choice(log_decay, np.full(gate, -20.0))
        beta = draw.choice(draw.uniform(0.0, 1.0, *gate), np.ones(gate), np.zeros(gate))
        # A state far above the values would cost the chunked form, which subtracts it at once, digits that the definition keeps.
        state = draw.uniform(-1.0, 1.0, batch, value_heads, key_dim, value_dim) * draw.choice(1.0, 0.0)
        op = cls(scale=draw.choice(key_dim**-0.5, 1.0))
        return Case(op, (q, k, v, log_decay, beta, state), (f32, f32, None, f32, f32, f32))


def chunked_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    state: Array,
    scale: float,
    chunk: int = CHUNK,
) -> tuple[Array, Array]:
    """The chunked form: arguments and results as ``GatedDeltaRule.reference``, in the dtype of ``state``.

    With G the log decays summed inside a chunk (in float64: the sums are large and their differences matter) and
    D[i, j] = exp(G[i] - G[j]) for j <= i: A = strict_lower(beta K K^T * D), U = (I + A)^-1 beta V,
    W = (I + A)^-1 beta exp(G) K. Then, chunk by chunk,
    N = U - W S, out = exp(G) Q S + (Q K^T * D) N, S = exp(G[-1]) S + (exp(G[-1] - G) K)^T N.
    The last chunk is filled with zeros, which change nothing.
    """
    seq, repeats = v.shape[1], v.shape[2] // k.shape[2]
    chunks = -(-seq // chunk)
    dtype = state.dtype
    queries = _chunks(q.repeat(repeats, axis=2) * scale, chunks, chunk)
    keys = _chunks(k.repeat(repeats, axis=2), chunks, chunk)
    values, decays, betas = (_chunks(x, chunks, chunk) for x in (wide(v), log_decay[..., None], beta[..., None]))

    total = decays.cumsum(axis=-2, dtype=np.float64)
    last = total[..., -1:, :]
    lower = np.tril(np.ones((chunk, chunk), bool))
    decay = np.exp(np.where(lower, total - total.swapaxes(-1, -2), -np.inf)).astype(dtype)
    since_start, until_end, whole = (np.exp(x).astype(dtype) for x in (total, last - total, last))
    strict = np.tril(betas * (keys @ keys.swapaxes(-1, -2)) * decay, -1)
    sides = np.concatenate([betas * values, betas * since_start * keys], axis=-1)
    solved = np.linalg.solve(strict + np.eye(chunk, dtype=dtype), sides)
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    scores = (queries @ keys.swapaxes(-1, -2)) * decay

    out = np.empty_like(values)
    for n in range(chunks):
        new = u[n] - w[n] @ state
        out[n] = (since_start[n] * queries[n]) @ state + scores[n] @ new
        state = whole[n] * state + (until_end[n] * keys[n]).swapaxes(-1, -2) @ new
    joined = out.transpose(1, 0, 3, 2, 4).reshape(v.shape[0], chunks * chunk, *v.shape[2:])
    return joined[:, :seq].astype(v.dtype), state


def _chunks(x: Array, chunks: int, chunk: int) -> Array:
    """[batch, seq, heads, width] -> [chunks, batch, heads, chunk, width], filled with zeros at the end."""
    batch, seq, heads, width = x.shape
    padded = np.zeros((batch, chunks * chunk, heads, width), x.dtype)
    padded[:, :seq] = x
    return padded.reshape(batch, chunks, chunk, heads, width).transpose(1, 0, 3, 2, 4)


def _torch_step(torch: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
    """One position: q, k, v [batch, 1, heads, width]."""
    state = state * log_decay[:, 0, :, None, None].exp()
    error = v[:, 0] - (state * k[:, 0, :, :, None]).sum(-2)
    state = state + k[:, 0, :, :, None] * (beta[:, 0, :, None] * error)[:, :, None]
    return (state * q[:, 0, :, :, None]).sum(-2)[:, None], state


def _torch_chunked(torch: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
    """``chunked_delta_rule`` with torch; heads are repeated and q scaled already."""
    seq = v.shape[1]

    def chunks(x: Any) -> Any:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -seq % CHUNK))
        return x.unflatten(1, (-1, CHUNK)).transpose(2, 3)

    queries, keys, values = chunks(q), chunks(k), chunks(v)
    decays, betas = chunks(log_decay[..., None]), chunks(beta[..., None])
    total = decays.cumsum(-2, dtype=torch.float64)
    last = total[..., -1:, :]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    decay = (total - total.mT).masked_fill(~lower, float("-inf")).to(state.dtype).exp()
    since_start, until_end, whole = (x.exp().to(state.dtype) for x in (total, last - total, last))
    strict = (betas * (keys @ keys.mT) * decay).tril(-1)
    sides = torch.cat([betas * values, betas * since_start * keys], dim=-1)
    solved = torch.linalg.solve_triangular(strict, sides, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (queries @ keys.mT) * decay

    out = []
    for n in range(total.shape[1]):
        new = u[:, n] - w[:, n] @ state
        out.append((since_start[:, n] * queries[:, n]) @ state + scores[:, n] @ new)
        state = whole[:, n] * state + (until_end[:, n] * keys[:, n]).mT @ new
    return torch.stack(out, dim=1).transpose(2, 3).flatten(1, 2)[:, :seq], state


def _unit(x: Array) -> Array:
    norms: Array = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    return x / norms
