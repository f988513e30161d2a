"""The k most likely experts of a token, their shares, and the shared expert's gate.

logits [tokens, E + 1] give weights and ids [tokens, k] and gate [tokens, 1]. The floor is a launch: a token's logits are 1 kB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.table import at_most, floats, power, table, tokens_of
from deltaloom.ops.fused_moe import GatedRouter

MOST_EXPERTS = 4096


@triton.jit
def _gated_router(
    logits: tl.tensor,
    weights: tl.tensor,
    ids: tl.tensor,
    gates: tl.tensor,
    stride: tl.tensor,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    PICKS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NARROW: tl.constexpr,
) -> None:
    """Order and number of an expert are one integer, so that ties go to the lowest id: the floats' bits sort as integers once the
    low bits of negative ones are flipped. For dtypes of 16 bits both fit into 32, whose maximum over a warp is one instruction."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, COLUMNS)
    row = logits + token * stride
    f = tl.load(row + at, at < EXPERTS, other=float("-inf")).to(tl.float32) + 0.0
    tl.store(gates + token, tl.load(row + EXPERTS))
    highest = tl.max(f, 0)
    whole = tl.sum(tl.exp(f - highest), 0)
    if NARROW:
        short = f.to(logits.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(short < 0, short ^ 0x7FFF, short) * 65536 + (COLUMNS - 1 - at)
        key = tl.where(at < EXPERTS, key, -2147483648)
    else:
        bits = f.to(tl.int32, bitcast=True)
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = tl.where(at < EXPERTS, order * 4294967296 + (COLUMNS - 1 - at), -9223372036854775807)
    pick = tl.arange(0, PICKS)
    chosen = tl.zeros([PICKS], tl.int32)
    for number in tl.static_range(K):
        best = tl.max(key, 0)
        chosen = tl.where(pick == number, (COLUMNS - 1 - (best & 0xFFFF)).to(tl.int32), chosen)
        key = tl.where(key == best, -2147483648 if NARROW else -9223372036854775807, key)
    value = tl.load(row + chosen, pick < K, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - highest) / whole
    if NORMALIZE:
        share = share / tl.sum(share, 0)
    tl.store(weights + token * K + pick, share.to(weights.dtype.element_ty), pick < K)
    tl.store(ids + token * K + pick, chosen, pick < K)


@table.kernel("gated_router", when=(floats("logits"), at_most("logits", -1, MOST_EXPERTS)))
def gated_router(op: GatedRouter, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One program a token: k rounds of a maximum over all experts."""
    batch, seq, columns = logits.shape
    rows, _ = tokens_of(logits.reshape(1, batch * seq, columns))
    weights = logits.new_empty(batch, seq, op.k)
    ids = torch.empty(batch, seq, op.k, dtype=torch.int32, device=logits.device)
    gates = logits.new_empty(batch, seq, 1)
    _gated_router[(batch * seq,)](
        rows,
        weights,
        ids,
        gates,
        rows.stride(1),
        EXPERTS=columns - 1,
        COLUMNS=power(columns - 1),
        K=op.k,
        PICKS=power(op.k),
        NORMALIZE=op.normalize,
        NARROW=logits.element_size() == 2,
        num_warps=1,
    )
    return weights, ids, gates
