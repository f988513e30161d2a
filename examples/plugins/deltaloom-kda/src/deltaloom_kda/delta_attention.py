"""Kimi Delta Attention (Kimi Team, "Kimi Linear", arXiv 2510.26692, section 3): the gated delta rule with a decay per channel."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.op import Array, Case, Cost, Draw, Inferred, Op
from deltaloom.graph.types import TensorType, f32
from deltaloom.ops.fused import Fused
from deltaloom.ops.laws import ChunkInvariant, PaddingIsNoOp, PermutationEquivariant, Streaming
from deltaloom.ops.precision import wide, wide_dtype
from deltaloom.ops.signature import Axes, floating, has_dtype

CHUNK = 16
"""Positions that the torch rule solves together: it holds so many decays for each element of k."""

SHARDING = "b s! h k!, b s! h k!, b s! h v, b s! h k!, b s! h, b h k! v -> b s! h v, b h k! v"


class DeltaAttention(Op):
    """S = diag(exp(log_decay)) S; S += k (beta (v - S^T k))^T; out = S^T (scale q), position by position, all in float32.

    q, k, log_decay [batch, seq, heads, dk], v [batch, seq, heads, dv], beta [batch, seq, heads], state S [batch, heads, dk, dv]. v
    is in the model dtype, to which out is rounded; all others are float32 (float64 if v is). q and k come normalised by
    ``l2_norm``; log_decay is at most 0."""

    name: ClassVar[str] = "kda.delta_attention"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_state")
    updates: ClassVar[dict[str, int]] = {"state": 1}
    sharding: ClassVar[str] = SHARDING
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
        for name, type_ in (("q", q), ("k", k), ("log_decay", log_decay)):
            axes.bind(name, type_, "batch seq heads key_dim")
        axes.bind("v", v, "batch seq heads value_dim")
        axes.bind("beta", beta, "batch seq heads")
        axes.bind("state", state, "batch heads key_dim value_dim")
        dtype = wide_dtype(floating("v", v))
        for name, type_ in (("q", q), ("k", k), ("log_decay", log_decay), ("beta", beta), ("state", state)):
            has_dtype(name, type_, dtype, f"for v {v}")
        return v, state

    def reference(self, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
        values, out = wide(v), []
        for t in range(v.shape[1]):
            state = np.exp(log_decay[:, t, :, :, None]) * state
            error = values[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + np.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
            out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t] * self.scale))
        return np.stack(out, axis=1).astype(v.dtype), state

    def chunked(self, chunk: int, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
        """The same, ``chunk`` positions at a time (the paper's section 3.1).

        With D[i, j] = exp(log_decay[j + 1] + ... + log_decay[i]), a vector over the channels, and G[i] = D[i, start]:
        A[i, j] = beta[i] sum_c k[i] D[i, j] k[j] for j < i; N = (I + A)^-1 beta (V - (G * K) S);
        out[i] = S^T (G[i] * q[i]) + sum_{j <= i} (q[i] D[i, j] k[j]) N[j]; S = G[last] S + sum_j (D[last, j] * k[j]) N[j]^T."""
        values, out = wide(v), []
        for start in range(0, v.shape[1], chunk):
            here = slice(start, start + chunk)
            keys, queries = k[:, here], q[:, here] * self.scale
            total = log_decay[:, here].cumsum(axis=1, dtype=np.float64)
            length = total.shape[1]
            lower = np.tril(np.ones((length, length), bool))[:, :, None, None]
            decay = np.exp(np.where(lower, total[:, :, None] - total[:, None], -np.inf)).astype(state.dtype)
            grown = np.exp(total).astype(state.dtype)
            products = np.einsum("bihc,bijhc,bjhc->bhij", keys, decay, keys)
            betas = beta[:, here].swapaxes(1, 2)[..., None]
            matrix = np.eye(length, dtype=state.dtype) + np.tril(betas * products, -1)
            error = values[:, here].swapaxes(1, 2) - np.einsum("bihc,bhcv->bhiv", grown * keys, state)
            new = np.linalg.solve(matrix, betas * error)
            scores = np.einsum("bihc,bijhc,bjhc->bhij", queries, decay, keys)
            out.append(np.einsum("bihc,bhcv->bihv", grown * queries, state) + np.einsum("bhij,bhjv->bihv", scores, new))
            state = grown[:, -1, :, :, None] * state + np.einsum("bjhc,bhjv->bhcv", decay[:, -1] * keys, new)
        return np.concatenate(out, axis=1).astype(v.dtype), state

    def torch(self, torch: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
        rule = _torch_step if v.shape[1] == 1 else _torch_chunked
        out, new_state = rule(torch, q * self.scale, k, v.to(state.dtype), log_decay, beta, state)
        return out.to(v.dtype), new_state

    def cost(self, q: TensorType, k: TensorType, v: TensorType, log_decay: TensorType, beta: TensorType, state: TensorType) -> Cost:
        """Of the recurrent form: three products with the state and its decay, a position."""
        return Cost(7 * v.shape[1] * state.elements(), self.moved_bytes(q, k, v, log_decay, beta, state))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        op, (q, k, *others) = cls(scale=draw.choice(1.0, 0.125)), draw_arrays(draw)
        arrays = (_unit(q), _unit(k), *others)
        return Case(op, arrays, (f32, f32, None, f32, f32, f32))


class NormedDeltaAttention(Fused):
    """``kda.delta_attention`` with q and k put through ``l2_norm`` first: what a layer does between its gates and its output.

    q, k in the model dtype; everything else as ``kda.delta_attention`` takes it."""

    name: ClassVar[str] = "kda.normed_delta_attention"
    outputs: ClassVar[tuple[str, ...]] = ("out", "new_state")
    updates: ClassVar[dict[str, int]] = {"state": 1}
    sharding: ClassVar[str] = SHARDING
    laws: ClassVar[tuple[Any, ...]] = (
        Streaming(("q", "k", "v", "log_decay", "beta")),
        PaddingIsNoOp(("q", "k", "v", "log_decay", "beta"), zero=("log_decay", "beta")),
        PermutationEquivariant(("q", "k", "v", "log_decay", "beta", "state")),
    )
    scale: float
    eps: float = 1e-6

    def infer(
        self, q: TensorType, k: TensorType, v: TensorType, log_decay: TensorType, beta: TensorType, state: TensorType
    ) -> Inferred:
        return self.types(q, k, v, log_decay, beta, state)

    def decompose(self, g: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
        q, k = g.l2_norm(q, eps=self.eps, name="q"), g.l2_norm(k, eps=self.eps, name="k")
        return g.kda.delta_attention(q, k, v, log_decay, beta, state, scale=self.scale)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        op = cls(scale=draw.choice(1.0, 0.125), eps=draw.choice(1e-6, 1e-2))
        return Case(op, draw_arrays(draw), (None, None, None, f32, f32, f32))


def draw_arrays(draw: Draw) -> tuple[Array, ...]:
    """Inputs with q and k of any length; now and then equal keys, decays that forget everything, beta 0 or 1."""
    batch, heads = draw.integer(1, 3), draw.integer(1, 4)
    seq = draw.choice(1, draw.choice(2, 3, 5), draw.choice(13, 15, 16, 17, 33, 65))
    key_dim, value_dim = draw.size(17), draw.size(17)
    q, k = (draw.normal(batch, seq, heads, key_dim) + 0.01 for _ in range(2))
    if draw.choice(False, True):
        k = np.broadcast_to(k[:, :1], k.shape).copy()
    v = draw.uniform(-0.3, 5.0, batch, seq, heads, value_dim) * draw.choice(1.0, 16.0)
    decays = draw.uniform(-2.0, 0.0, batch, seq, heads, key_dim) * draw.choice(1.0, 10.0, 0.0)
    log_decay = draw.choice(decays, np.full(decays.shape, -20.0))
    gate = (batch, seq, heads)
    beta = draw.choice(draw.uniform(0.0, 1.0, *gate), np.ones(gate), np.zeros(gate))
    # A state far above the values would cost the chunked form, which subtracts it at once, digits that the definition keeps.
    return q, k, v, log_decay, beta, draw.uniform(-1.0, 1.0, batch, heads, key_dim, value_dim)


def _unit(x: Array) -> Array:
    norms: Array = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    return x / norms


def _torch_step(torch: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
    """One position: q, k, log_decay [batch, 1, heads, dk], v [batch, 1, heads, dv]; q is scaled."""
    state = state * log_decay[:, 0, :, :, None].exp()
    error = v[:, 0] - (state * k[:, 0, :, :, None]).sum(-2)
    state = state + k[:, 0, :, :, None] * (beta[:, 0, :, None] * error)[:, :, None]
    return (state * q[:, 0, :, :, None]).sum(-2)[:, None], state


def _torch_chunked(torch: Any, q: Any, k: Any, v: Any, log_decay: Any, beta: Any, state: Any) -> Any:
    """``DeltaAttention.chunked`` with torch, filled to whole chunks with zeros, which change nothing; q is scaled."""
    seq = v.shape[1]

    def chunks(x: Any) -> Any:
        """[batch, seq, heads, width] -> [batch, chunks, heads, CHUNK, width]"""
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -seq % CHUNK))
        return x.unflatten(1, (-1, CHUNK)).transpose(2, 3)

    queries, keys, values, betas = chunks(q), chunks(k), chunks(v), chunks(beta[..., None])
    total = chunks(log_decay).cumsum(-2, dtype=torch.float64)
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).triu(1)[:, :, None]
    decay = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(upper, float("-inf")).to(state.dtype).exp()
    grown, until_end = total.exp().to(state.dtype), (total[..., -1:, :] - total).exp().to(state.dtype)
    read = keys.unsqueeze(-3) * decay
    strict = (betas * (read @ keys.unsqueeze(-1)).squeeze(-1)).tril(-1)
    scores = (read @ queries.unsqueeze(-1)).squeeze(-1)
    sides = torch.cat([betas * values, betas * grown * keys], dim=-1)
    solved = torch.linalg.solve_triangular(strict, sides, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    out = []
    for n in range(total.shape[1]):
        new = u[:, n] - w[:, n] @ state
        out.append((grown * queries)[:, n] @ state + scores[:, n] @ new)
        state = grown[:, n, :, -1, :, None] * state + (until_end * keys)[:, n].mT @ new
    return torch.stack(out, dim=1).transpose(2, 3).flatten(1, 2)[:, :seq], state
