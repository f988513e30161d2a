"""Routed experts and the shared one, for many tokens: rows sorted by expert in tiles, each a product on the matrix units.

Shapes as in moe.py. Floor: every chosen expert read once, or the products' arithmetic, whichever is longer. Four launches without
a word to the host: ``_order`` gives every expert whole tiles of ``TILE`` rows, ``_inner`` and ``_outer`` are the two products, and
``combine`` adds a token's experts in the order of their ranks, so that the sum does not depend on how rows were sorted. The
shared expert is the expert after the last one; every token chose it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.quantized import parts
from deltaloom.backends.cuda.table import interpreted, power
from deltaloom.graph.quantized import QuantizedArray

MANY = 8192
"""Pairs from which tiles have more rows."""

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
def _product(
    x: tl.tensor,
    source: tl.tensor,
    real: tl.tensor,
    matrix: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    inside: tl.tensor,
    width: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Rows ``source`` of x [.., room] times rows ``first`` onward of a matrix [.., width], in float32."""
    row = first + tl.arange(0, ROWS)
    blocks = scale + (first // 128) * ((width + 127) // 128)
    total = tl.zeros([TILE, ROWS], tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        known = column < width
        f = tl.load(x + source[:, None] * room + column[None, :], real[:, None] & known[None, :], other=0.0)
        w = tl.load(matrix + row[None, :] * width + column[:, None], inside[None, :] & known[:, None], other=0.0)
        if WIDEN:
            part = tl.dot(f.to(tl.float32), w.to(tl.float32), input_precision="ieee")
        else:
            part = tl.dot(f, w.to(f.dtype), input_precision="ieee")
        total += part * tl.load(blocks + start // 128) if FP8 else part
    return total


@triton.jit
def _inner(
    x: tl.tensor,
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
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """silu(gate) * up of the rows of one tile, ROWS numbers of each."""
    tile, first = tl.program_id(1), tl.program_id(0) * ROWS
    dtype = inner.dtype.element_ty
    expert = tl.load(owners + tile).to(tl.int64)
    if expert >= 0:
        pair = tl.load(rows + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        real = pair < pairs
        matrix, scale, size = shared, shared_scale, shared_width
        if expert < experts:
            matrix = gate_up + expert * 2 * intermediate * hidden
            scale = gate_up_scale + expert * ((2 * intermediate + 127) // 128) * ((hidden + 127) // 128)
            size = intermediate
        at = first + tl.arange(0, ROWS)
        inside = at < size
        source = pair // (k + 1)
        gate = _product(x, source, real, matrix, scale, first, inside, hidden, hidden, TILE, ROWS, WIDTH, FP8, WIDEN)
        up = _product(x, source, real, matrix, scale, size + first, inside, hidden, hidden, TILE, ROWS, WIDTH, FP8, WIDEN)
        gate = gate.to(dtype).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        tl.store(inner + pair[:, None] * room + at[None, :], value.to(dtype), real[:, None] & inside[None, :])


@triton.jit
def _outer(
    inner: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    down: tl.tensor,
    down_scale: tl.tensor,
    shared: tl.tensor,
    shared_scale: tl.tensor,
    results: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    shared_width: tl.tensor,
    room: tl.tensor,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """What one expert makes of the rows of one tile, ROWS outputs of each."""
    tile, first = tl.program_id(1), tl.program_id(0) * ROWS
    expert = tl.load(owners + tile).to(tl.int64)
    if expert >= 0:
        pair = tl.load(rows + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        real = pair < pairs
        matrix, scale, size = shared, shared_scale, shared_width
        if expert < experts:
            matrix = down + expert * hidden * intermediate
            scale = down_scale + expert * ((hidden + 127) // 128) * ((intermediate + 127) // 128)
            size = intermediate
        at = first + tl.arange(0, ROWS)
        inside = at < hidden
        total = _product(inner, pair, real, matrix, scale, first, inside, size, room, TILE, ROWS, WIDTH, FP8, WIDEN)
        place = pair[:, None] * hidden + at[None, :]
        tl.store(results + place, total.to(results.dtype.element_ty), real[:, None] & inside[None, :])


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


def shared_moe_sorted(
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
    room, pairs = max(intermediate, shared), tokens * (k + 1)
    tile = 16 if pairs < MANY else 32 if pairs < 8 * MANY else 64
    tiles = min(pairs, experts + 1 + pairs // tile)
    integers = {"dtype": torch.int32, "device": rows.device}
    counts = torch.empty(2, power(experts + 1), **integers)  # type: ignore[call-overload]
    order = torch.empty(tiles * tile, **integers)  # type: ignore[call-overload]
    owners = torch.empty(tiles, **integers)  # type: ignore[call-overload]
    step = min(1024, max(16, power(pairs)))
    sizes = (pairs, k, experts)
    _order[(1,)](
        ids, counts, order, owners, *sizes, tiles * tile, tiles, EXPERTS=counts.shape[1], TILE=tile, STEP=step, num_warps=8
    )
    inner, results, y = rows.new_empty(pairs, room), rows.new_empty(pairs, hidden), torch.empty_like(rows)
    widths = (hidden, intermediate, shared, room)
    block = 128 if rows.element_size() == 2 or isinstance(gate_up, QuantizedArray) else 64
    choice = {"TILE": tile, "WIDTH": block, "FP8": isinstance(gate_up, QuantizedArray), "WIDEN": interpreted(), "num_stages": 3}
    _inner[(triton.cdiv(room, 32), tiles)](
        rows, order, owners, *parts(gate_up), *parts(shared_gate_up), inner, *sizes, *widths, ROWS=32, num_warps=4, **choice
    )
    _outer[(triton.cdiv(hidden, 64), tiles)](
        inner, order, owners, *parts(down), *parts(shared_down), results, pairs, experts, *widths, ROWS=64, num_warps=4, **choice
    )
    combine(results, weights, gate, results[k:], y, (k + 1) * hidden, (k + 1) * hidden)
    return y
