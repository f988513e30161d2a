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

MANY = 1024
"""Pairs from which tiles have more rows."""

Weight = torch.Tensor | QuantizedArray


@triton.jit
def _order(
    ids: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    places: tl.tensor,
    tiles: tl.tensor,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """One program. ``counts`` [2, EXPERTS] holds zeros; ``rows`` [places] gets a pair or ``pairs`` for nobody; ``owners`` [tiles]
    an expert or -1."""
    at, expert = tl.arange(0, STEP), tl.arange(0, EXPERTS)
    for start in range(0, pairs, STEP):
        known = start + at < pairs
        tl.atomic_add(counts + tl.load(ids + start + at, known, other=0), 1, known)
    for start in range(0, places, STEP):
        tl.store(rows + start + at, tl.zeros([STEP], tl.int32) + pairs, start + at < places)
    for start in range(0, tiles, STEP):
        tl.store(owners + start + at, tl.zeros([STEP], tl.int32) - 1, start + at < tiles)
    tl.debug_barrier()
    count = tl.load(counts + expert)
    used = (count + TILE - 1) // TILE
    first = tl.cumsum(used, 0) - used
    tl.store(counts + EXPERTS + expert, first * TILE)
    for number in range(0, tl.max(used, 0)):
        tl.store(owners + first + number, expert, (number < used) & (expert < experts))
    tl.debug_barrier()
    for start in range(0, pairs, STEP):
        known = start + at < pairs
        place = tl.atomic_add(counts + EXPERTS + tl.load(ids + start + at, known, other=0), 1, known)
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
        if FP8:
            part = part * tl.load(scale + (first // 128) * ((width + 127) // 128) + start // 128)
        total += part
    return total


@triton.jit
def _inner(
    x: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    gate_up: tl.tensor,
    gate_up_scale: tl.tensor,
    inner: tl.tensor,
    pairs: tl.tensor,
    k: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
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
        at = first + tl.arange(0, ROWS)
        inside = at < intermediate
        matrix = gate_up + expert * 2 * intermediate * hidden
        scale = gate_up_scale + expert * ((2 * intermediate + 127) // 128) * ((hidden + 127) // 128)
        source = pair // k
        gate = _product(x, source, real, matrix, scale, first, inside, hidden, hidden, TILE, ROWS, WIDTH, FP8, WIDEN)
        up = _product(x, source, real, matrix, scale, intermediate + first, inside, hidden, hidden, TILE, ROWS, WIDTH, FP8, WIDEN)
        gate = gate.to(dtype).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        tl.store(inner + pair[:, None] * intermediate + at[None, :], value.to(dtype), real[:, None] & inside[None, :])


@triton.jit
def _outer(
    inner: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    down: tl.tensor,
    down_scale: tl.tensor,
    results: tl.tensor,
    pairs: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
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
        at = first + tl.arange(0, ROWS)
        inside = at < hidden
        matrix = down + expert * hidden * intermediate
        scale = down_scale + expert * ((hidden + 127) // 128) * ((intermediate + 127) // 128)
        total = _product(inner, pair, real, matrix, scale, first, inside, intermediate, intermediate, TILE, ROWS, WIDTH, FP8, WIDEN)
        tl.store(
            results + pair[:, None] * hidden + at[None, :], total.to(results.dtype.element_ty), real[:, None] & inside[None, :]
        )


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
    k = ids.shape[-1]
    routed = _experts(rows, ids, gate_up, down)
    everybody = torch.zeros(tokens, 1, dtype=torch.int32, device=rows.device)
    shared = _experts(rows, everybody, _stack(shared_gate_up), _stack(shared_down))
    y = torch.empty_like(rows)
    combine(routed, weights, gate, shared, y, k * hidden, hidden)
    return y


def _stack(weight: Weight) -> Weight:
    """A matrix as a stack of one."""
    if isinstance(weight, QuantizedArray):
        return QuantizedArray(weight.data[None], weight.scale[None], weight.form, (1, *weight.shape))
    return weight[None]


def _experts(rows: torch.Tensor, ids: torch.Tensor, gate_up: Weight, down: Weight) -> torch.Tensor:
    """What each chosen expert makes of each token, [tokens k, H]."""
    tokens, hidden = rows.shape
    k, (experts, _, intermediate) = ids.shape[-1], down.shape
    pairs = tokens * k
    tile = 16 if pairs < MANY * 4 else 32 if pairs < MANY * 32 else 64
    tiles = min(pairs, experts + pairs // tile)
    places, room = tiles * tile, power(experts)
    device = rows.device
    counts = torch.zeros(2, room, dtype=torch.int32, device=device)
    order = torch.empty(places, dtype=torch.int32, device=device)
    owners = torch.empty(tiles, dtype=torch.int32, device=device)
    step = min(1024, max(16, power(pairs)))
    _order[(1,)](ids, counts, order, owners, pairs, experts, places, tiles, EXPERTS=room, TILE=tile, STEP=step, num_warps=8)
    inner, results = rows.new_empty(pairs, intermediate), rows.new_empty(pairs, hidden)
    fp8 = isinstance(gate_up, QuantizedArray)
    block = 128 if fp8 else 64 if rows.element_size() == 4 else 128
    widths = {"TILE": tile, "WIDTH": block, "FP8": fp8, "WIDEN": interpreted(), "num_warps": 4, "num_stages": 3}
    _inner[(triton.cdiv(intermediate, 32), tiles)](
        rows, order, owners, *parts(gate_up), inner, pairs, k, hidden, intermediate, ROWS=32, **widths
    )
    _outer[(triton.cdiv(hidden, 64), tiles)](
        inner, order, owners, *parts(down), results, pairs, hidden, intermediate, ROWS=64, **widths
    )
    return results
