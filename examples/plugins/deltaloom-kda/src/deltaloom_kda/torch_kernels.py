"""Kimi Delta Attention for the torch backend: one step for one token, chunks for more, formed as in
``numpy_kernels``."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from deltaloom.passes.kernel import KernelTable
from deltaloom_kda.delta_attention import DeltaAttention

table = KernelTable("torch")

CHUNK = 16
"""Positions that are solved together, a power of two."""

SEGMENT = 1024
"""Positions whose intermediate results are held at once: memory stays bounded however long the sequence is."""


@table.kernel("kda.delta_attention")
def delta_attention(
    op: DeltaAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state is updated in place."""
    seq = v.shape[1]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if seq == 1:
        out[:, 0] = _step(q[:, 0] * op.scale, k[:, 0], v[:, 0], log_decay[:, 0].exp(), beta[:, 0, :, None], state)
        return out, state
    for start in range(0, seq, SEGMENT):
        at = slice(start, start + SEGMENT)
        out[:, at] = _chunked(q[:, at] * op.scale, k[:, at], v[:, at], log_decay[:, at], beta[:, at], state)
    return out, state


def _step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token: q (scaled), k, decay [batch, heads, dk], v [batch, heads, dv], beta [batch, heads, 1]."""
    # Read and write both begin from the old state, so that it is read once.
    read = torch.stack((q, k), 2) * decay[:, :, None] @ state
    error = (v - read[:, :, 1]) * beta
    state.mul_(decay[..., None]).addcmul_(k[..., None], error[:, :, None])
    return read[:, :, 0] + (q * k).sum(-1, keepdim=True) * error


def _chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    batch, seq, heads, value_dim = v.shape
    count = -(-seq // CHUNK)

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """[batch, seq, heads, width] -> [batch, heads, count, CHUNK, width], filled with zeros at the end, which change nothing."""
        filled = pad(x, (0, 0, 0, 0, 0, count * CHUNK - seq))
        return filled.view(batch, count, CHUNK, heads, x.shape[-1]).permute(0, 3, 1, 2, 4).contiguous()

    queries, keys, values, betas = chunks(q), chunks(k), chunks(v.to(state.dtype)), chunks(beta[..., None])
    strict, scores, since_start, until_end = _products(queries, keys, chunks(log_decay).exp_())
    # The solver gives columns in a row, so both sides are transposed.
    identity = torch.eye(CHUNK, dtype=state.dtype, device=state.device).expand_as(strict)
    inverse = torch.linalg.solve_triangular((strict * betas).mT, identity, upper=True, unitriangular=True).mT
    inverse = inverse * betas.mT
    new, w = inverse @ values, inverse @ (since_start * keys)
    readers = torch.cat((w, since_start * queries), -2)
    writers = (until_end * keys).mT
    whole = since_start[..., -1, :, None]
    out = torch.empty_like(values)
    for n in range(count):
        read = readers[:, :, n] @ state
        added = new[:, :, n] - read[:, :, :CHUNK]
        out[:, :, n] = read[:, :, CHUNK:] + scores[:, :, n] @ added
        state.mul_(whole[:, :, n]).add_(writers[:, :, n] @ added)
    return out.permute(0, 2, 3, 1, 4).reshape(batch, count * CHUNK, heads, value_dim)[:, :seq]


def _products(
    queries: torch.Tensor, keys: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in ``numpy_kernels``: decayed products of all pairs [batch, heads, count, CHUNK, CHUNK], of keys below the diagonal and
    of queries on it too; each position's decays since its chunk's start (its own among them) and until its end."""
    lead, width = keys.shape[:3], keys.shape[-1]
    strict, scores = (torch.zeros(*lead, CHUNK, CHUNK, dtype=keys.dtype, device=keys.device) for _ in range(2))
    scores.diagonal(dim1=-2, dim2=-1).copy_((queries * keys).sum(-1))
    since_start, until_end = decay, torch.ones_like(decay)
    half = 1
    while half < CHUNK:
        pairs = CHUNK // (2 * half)
        first = until_end.view(*lead, pairs, 2, half, width)[..., 0, :, :]
        second = since_start.view(*lead, pairs, 2, half, width)[..., 1, :, :]
        columns = (first * keys.view(*lead, pairs, 2, half, width)[..., 0, :, :]).mT
        for rows, matrix in ((keys, strict), (queries, scores)):
            block = matrix.view(*lead, pairs, 2, half, pairs, 2, half)[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2)
            product = second * rows.view(*lead, pairs, 2, half, width)[..., 1, :, :] @ columns
            block.copy_(product.movedim(-3, -1))
        whole = since_start.view(*lead, pairs, 2, half, width)[..., -1:, :].clone()
        second *= whole[..., 0, :, :]
        first *= whole[..., 1, :, :]
        half *= 2
    return strict, scores, since_start, until_end
