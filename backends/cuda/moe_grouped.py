"""Routed experts and the shared one: rows grouped by expert, each group a product on the matrix units that reads an expert once.

Shapes as in moe.py. Floor: every chosen expert read once, or the products' arithmetic, whichever is longer. For few tokens each
expert that was chosen looks for its tokens itself; for more, ``_order`` gives every expert whole tiles of rows, without a word to
the host. ``_inner`` and ``_outer`` are the two products, weights times rows, so that the rows, of which an expert has few, are the
narrow side. ``combine`` adds a token's experts in the order of their ranks, so that the sum does not depend on how rows were
grouped. The shared expert is the expert after the last one; every token chose it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.quantized import parts, weights_times_rows
from deltaloom.backends.cuda.table import interpreted, power
from deltaloom.graph.quantized import QuantizedArray

FEW = 16
"""Tokens up to which experts look for their rows themselves."""

MANY = 8192
"""Pairs from which tiles have more rows."""

ROWS, STAGES, WARPS = 64, 3, 4
"""Rows of a weight that a program multiplies, tiles of columns that are under way, and its warps."""

Weight = torch.Tensor | QuantizedArray


@triton.jit
def _expert(ids: tl.tensor, pair: tl.tensor, k: tl.tensor, experts: tl.tensor, known: tl.tensor) -> tl.tensor:
    """The expert of a pair of token and rank; after the k chosen ones of a token comes the shared one."""
    token, rank = pair // (k + 1), pair % (k + 1)
    return tl.where(rank < k, tl.load(ids + token * k + rank, known & (rank < k), other=0), experts)


@triton.jit
def _order(
    ids: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    pairs: tl.tensor,
    k: tl.tensor,
    experts: tl.tensor,
    places: tl.tensor,
    tiles: tl.tensor,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """One program. ``counts`` [2, EXPERTS] holds anything; ``rows`` [places] gets a pair or ``pairs`` for nobody; ``owners``
    [tiles] an expert or -1."""
    at, expert = tl.arange(0, STEP), tl.arange(0, EXPERTS)
    tl.store(counts + expert, tl.zeros([EXPERTS], tl.int32))
    for start in range(0, places, STEP):
        tl.store(rows + start + at, tl.zeros([STEP], tl.int32) + pairs, start + at < places)
    for start in range(0, tiles, STEP):
        tl.store(owners + start + at, tl.zeros([STEP], tl.int32) - 1, start + at < tiles)
    tl.debug_barrier()
    for start in range(0, pairs, STEP):
        known = start + at < pairs
        tl.atomic_add(counts + _expert(ids, start + at, k, experts, known), 1, known)
    tl.debug_barrier()
    count = tl.load(counts + expert, cache_modifier=".cg")
    used = (count + TILE - 1) // TILE
    first = tl.cumsum(used, 0) - used
    tl.store(counts + EXPERTS + expert, first * TILE)
    for number in range(0, tl.max(used, 0)):
        tl.store(owners + first + number, expert, (number < used) & (expert <= experts))
    tl.debug_barrier()
    for start in range(0, pairs, STEP):
        known = start + at < pairs
        place = tl.atomic_add(counts + EXPERTS + _expert(ids, start + at, k, experts, known), 1, known)
        tl.store(rows + place, start + at, known)


@triton.jit
def _group(
    ids: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    pairs: tl.tensor,
    k: tl.tensor,
    experts: tl.tensor,
    TILE: tl.constexpr,
    PICKS: tl.constexpr,
    SORTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The expert of this program, or -1, and its pairs [TILE] of token and rank, ``pairs`` for nobody. Without an order a program
    stands for one choice of one token, and works for all tokens if none before it made the same."""
    group, at = tl.program_id(1), tl.arange(0, TILE)
    if SORTED:
        expert = tl.load(owners + group)
        pair = tl.load(rows + group * TILE + at)
    else:
        chosen = pairs // (k + 1) * k
        rank = tl.arange(0, PICKS)
        place = at[:, None] * k + rank[None, :]
        known = (rank < k)[None, :] & (place < chosen)
        expert = tl.load(ids + group, group < chosen, other=experts)
        mine = known & (tl.load(ids + place, known, other=-1) == expert)
        first = tl.min(tl.min(tl.where(mine, place, chosen), 1), 0)
        column = tl.max(tl.where(mine, rank[None, :], -1), 1)
        column = tl.where(expert == experts, k, column)
        expert = tl.where(first == group, expert, -1)
        pair = tl.where(column >= 0, at * (k + 1) + column, pairs)
        pair = tl.where(at * k < chosen, pair, pairs)
    return expert.to(tl.int64), pair.to(tl.int64)


@triton.jit
def _inner(
    x: tl.tensor,
    ids: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    gate_up: tl.tensor,
    gate_up_scale: tl.tensor,
    shared: tl.tensor,
    shared_scale: tl.tensor,
    inner: tl.tensor,
    pairs: tl.tensor,
    k: tl.tensor,
    experts: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    shared_width: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    PICKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    SORTED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """silu(gate) * up of the rows of one group, ROWS numbers of each."""
    dtype = inner.dtype.element_ty
    expert, pair = _group(ids, rows, owners, pairs, k, experts, TILE, PICKS, SORTED)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix, scale, size = shared, shared_scale, shared_width
    across = (hidden + 127) // 128
    if expert < experts:
        matrix = gate_up + expert * 2 * intermediate * hidden
        scale = gate_up_scale + expert * ((2 * intermediate + 127) // 128) * across
        size = intermediate
    first = tl.program_id(0) * ROWS
    if (expert >= 0) & (first < size):
        real, inside = pair < pairs, at < size
        gates, ups = scale + first // 128 * across, scale + (size + first) // 128 * across
        gate, up = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, hidden, WIDTH):
            column = start + tl.arange(0, WIDTH)
            known = column < hidden
            place, there = at[:, None] * hidden + column[None, :], inside[:, None] & known[None, :]
            w = tl.load(matrix + place, there, other=0.0)
            v = tl.load(matrix + size * hidden + place, there, other=0.0)
            f = tl.load(x + (pair // (k + 1))[None, :] * hidden + column[:, None], real[None, :] & known[:, None], other=0.0)
            if FP8:
                gate += weights_times_rows(w, f, WIDEN) * tl.load(gates + start // 128)
                up += weights_times_rows(v, f, WIDEN) * tl.load(ups + start // 128)
            else:
                gate += weights_times_rows(w, f, WIDEN)
                up += weights_times_rows(v, f, WIDEN)
        gate = gate.to(dtype).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        tl.store(inner + pair[None, :] * room + at[:, None], value.to(dtype), real[None, :] & inside[:, None])


@triton.jit
def _outer(
    inner: tl.tensor,
    ids: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    down: tl.tensor,
    down_scale: tl.tensor,
    shared: tl.tensor,
    shared_scale: tl.tensor,
    results: tl.tensor,
    pairs: tl.tensor,
    k: tl.tensor,
    experts: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    shared_width: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    PICKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    SORTED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """What one expert makes of the rows of one group, ROWS outputs of each."""
    expert, pair = _group(ids, rows, owners, pairs, k, experts, TILE, PICKS, SORTED)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix, scale, size = shared, shared_scale, shared_width
    if expert < experts:
        matrix = down + expert * hidden * intermediate
        scale = down_scale + expert * ((hidden + 127) // 128) * ((intermediate + 127) // 128)
        size = intermediate
    if expert >= 0:
        real, inside = pair < pairs, at < hidden
        blocks = scale + tl.program_id(0) * ROWS // 128 * ((size + 127) // 128)
        total = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, size, WIDTH):
            column = start + tl.arange(0, WIDTH)
            known = column < size
            w = tl.load(matrix + at[:, None] * size + column[None, :], inside[:, None] & known[None, :], other=0.0)
            f = tl.load(inner + pair[None, :] * room + column[:, None], real[None, :] & known[:, None], other=0.0)
            part = weights_times_rows(w, f, WIDEN)
            total += part * tl.load(blocks + start // 128) if FP8 else part
        place = pair[None, :] * hidden + at[:, None]
        tl.store(results + place, total.to(results.dtype.element_ty), real[None, :] & inside[:, None])


@triton.jit
def _combined(
    results: tl.tensor,
    weights: tl.tensor,
    gates: tl.tensor,
    shared: tl.tensor,
    y: tl.tensor,
    k: tl.tensor,
    hidden: tl.tensor,
    stride: tl.tensor,
    shared_stride: tl.tensor,
    PICKS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """The weighted sum of a token's experts, and the shared expert's part."""
    token = tl.program_id(1).to(tl.int64)
    dtype = y.dtype.element_ty
    at, pick = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH), tl.arange(0, PICKS)
    inside, chosen = at < hidden, pick < k
    share = tl.load(weights + token * k + pick, chosen, other=0.0).to(tl.float32)
    place = token * stride + pick[:, None] * hidden + at[None, :]
    values = tl.load(results + place, chosen[:, None] & inside[None, :], other=0.0).to(tl.float32)
    gate = tl.load(gates + token).to(tl.float32)
    own = tl.load(shared + token * shared_stride + at, inside, other=0.0).to(tl.float32)
    open_ = (1.0 / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    total = tl.sum(values * share[:, None], 0).to(dtype).to(tl.float32)
    tl.store(y + token * hidden + at, (total + (own * open_).to(dtype).to(tl.float32)).to(dtype), inside)


def combine(
    results: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    shared: torch.Tensor,
    y: torch.Tensor,
    stride: int,
    shared_stride: int,
) -> None:
    """Fill y [tokens, H] from what a token's experts and the shared one made of it; both strides are from token to token."""
    tokens, hidden = y.shape
    k = weights.shape[-1]
    width = min(256, power(hidden))
    grid = (triton.cdiv(hidden, width), tokens)
    _combined[grid](results, weights, gate, shared, y, k, hidden, stride, shared_stride, PICKS=power(k), WIDTH=width, num_warps=4)


def shared_moe_grouped(
    rows: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
) -> torch.Tensor:
    """rows [tokens, H] and the rest as ``shared_moe`` takes them, contiguous; gives [tokens, H]."""
    tokens, hidden = rows.shape
    k, (experts, _, intermediate), shared = ids.shape[-1], down.shape, shared_down.shape[1]
    room, pairs, fp8 = max(intermediate, shared), tokens * (k + 1), isinstance(gate_up, QuantizedArray)
    if tokens <= FEW:
        tile, groups, order, owners = max(8, power(tokens)), tokens * k + 1, ids, ids
    else:
        tile = 16 if pairs < MANY else 32 if pairs < 8 * MANY else 64
        groups = min(pairs, experts + 1 + pairs // tile)
        order, owners = ordered(ids, experts, groups, tile)
    inner, results, y = rows.new_empty(pairs, room), rows.new_empty(pairs, hidden), torch.empty_like(rows)
    sizes = (pairs, k, experts, hidden, intermediate, shared, room)
    choice = {
        "TILE": tile,
        "PICKS": power(k),
        "ROWS": ROWS,
        "WIDTH": 128 if rows.element_size() == 2 or fp8 else 64,
        "FP8": fp8,
        "SORTED": tokens > FEW,
        "WIDEN": interpreted(),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
    _inner[(triton.cdiv(room, ROWS), groups)](
        rows, ids, order, owners, *parts(gate_up), *parts(shared_gate_up), inner, *sizes, **choice
    )
    _outer[(triton.cdiv(hidden, ROWS), groups)](
        inner, ids, order, owners, *parts(down), *parts(shared_down), results, *sizes, **choice
    )
    combine(results, weights, gate, results[k:], y, (k + 1) * hidden, (k + 1) * hidden)
    return y


def ordered(ids: torch.Tensor, experts: int, tiles: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of token and rank by expert in whole tiles [tiles * tile], and the expert of each tile [tiles]."""
    k = ids.shape[-1]
    pairs = ids.numel() // k * (k + 1)
    integers = {"dtype": torch.int32, "device": ids.device}
    counts = torch.empty(2, power(experts + 1), **integers)  # type: ignore[call-overload]
    order = torch.empty(tiles * tile, **integers)  # type: ignore[call-overload]
    owners = torch.empty(tiles, **integers)  # type: ignore[call-overload]
    step = min(1024, max(16, power(pairs)))
    sizes, blocks = (pairs, k, experts, tiles * tile, tiles), {"EXPERTS": counts.shape[1], "TILE": tile, "STEP": step}
    _order[(1,)](ids, counts, order, owners, *sizes, **blocks, num_warps=8)
    return order, owners
