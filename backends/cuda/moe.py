"""Routed experts and the shared one, for one token: each chosen expert is a matrix times a vector.

x [1, tokens, H]; weights, ids [1, tokens, k]; gate [1, tokens, 1]; gate_up [E, 2 I, H]; down [E, H, I]; shared_gate_up [2 S, H];
shared_down [H, S]. Floor: every chosen expert read once, 3 I H itemsize bytes (6.3 MB in bfloat16 for the 80B), and the shared one.
Three launches: ``_inner`` gives silu(gate) * up of every expert, ``_outer`` the products with ``down``, and ``combine`` their
weighted sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.moe_grouped import combine, shared_moe_grouped
from deltaloom.backends.cuda.quantized import parts, plain_or_fp8, whole_blocks
from deltaloom.backends.cuda.table import at_most, floats, power, table
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.passes.kernel import is_param

ROWS, OUTPUTS = 8, 16
"""Numbers that a program of the first product gives where weights take a byte, and of the second; all that it reads is on its way
at once."""

LONGEST = 2048
"""Columns of a matrix that a program reads at once."""

WARPS = 4

Weight = torch.Tensor | QuantizedArray


@triton.jit
def _tile(
    weight: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    inside: tl.tensor,
    start: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Rows ``first`` and on, columns ``start`` and on of a matrix [.., width]."""
    row, column = first + tl.arange(0, ROWS), start + tl.arange(0, WIDTH)
    return tl.load(weight + row[:, None] * width + column[None, :], inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _times(
    w: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
) -> tl.tensor:
    """A tile times its columns of x [width], in float32."""
    column = start + tl.arange(0, WIDTH)
    known = column < width
    f = tl.load(x + column, known, other=0.0).to(tl.float32)
    if FP8:
        f = f * tl.load(scale + (first // 128) * ((width + 127) // 128) + column // 128, known, other=0.0)
    return tl.sum(w.to(tl.float32) * f[None, :], 1)


@triton.jit
def _inner(
    x: tl.tensor,
    ids: tl.tensor,
    gate_up: tl.tensor,
    gate_up_scale: tl.tensor,
    shared: tl.tensor,
    shared_scale: tl.tensor,
    inner: tl.tensor,
    k: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    shared_width: tl.tensor,
    room: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """ROWS numbers of silu(gate) * up of one of the k + 1 experts, of which the last is the shared one."""
    rank, first = tl.program_id(1), tl.program_id(0) * ROWS
    dtype = inner.dtype.element_ty
    at = first + tl.arange(0, ROWS)
    matrix, scale, size = shared, shared_scale, shared_width
    if rank < k:
        expert = tl.load(ids + rank).to(tl.int64)
        matrix = gate_up + expert * 2 * intermediate * hidden
        scale = gate_up_scale + expert * ((2 * intermediate + 127) // 128) * ((hidden + 127) // 128)
        size = intermediate
    if first < size:
        inside = at < size
        w, v = (
            _tile(matrix, first, hidden, inside, 0, ROWS, WIDTH),
            _tile(matrix, size + first, hidden, inside, 0, ROWS, WIDTH),
        )
        gate = _times(w, x, scale, first, hidden, 0, WIDTH, FP8)
        up = _times(v, x, scale, size + first, hidden, 0, WIDTH, FP8)
        for start in range(WIDTH, hidden, WIDTH):
            w = _tile(matrix, first, hidden, inside, start, ROWS, WIDTH)
            v = _tile(matrix, size + first, hidden, inside, start, ROWS, WIDTH)
            gate += _times(w, x, scale, first, hidden, start, WIDTH, FP8)
            up += _times(v, x, scale, size + first, hidden, start, WIDTH, FP8)
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        tl.store(inner + rank * room + at, value.to(dtype), inside)


@triton.jit
def _outer(
    inner: tl.tensor,
    ids: tl.tensor,
    down: tl.tensor,
    down_scale: tl.tensor,
    shared: tl.tensor,
    shared_scale: tl.tensor,
    results: tl.tensor,
    k: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    shared_width: tl.tensor,
    room: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """ROWS outputs of one expert, or of the shared one."""
    rank, first = tl.program_id(1), tl.program_id(0) * ROWS
    at = first + tl.arange(0, ROWS)
    inside = at < hidden
    matrix, scale, size = shared, shared_scale, shared_width
    if rank < k:
        expert = tl.load(ids + rank).to(tl.int64)
        matrix = down + expert * hidden * intermediate
        scale = down_scale + expert * ((hidden + 127) // 128) * ((intermediate + 127) // 128)
        size = intermediate
    source = inner + rank * room
    w = _tile(matrix, first, size, inside, 0, ROWS, WIDTH)
    total = _times(w, source, scale, first, size, 0, WIDTH, FP8)
    for start in range(WIDTH, size, WIDTH):
        w = _tile(matrix, first, size, inside, start, ROWS, WIDTH)
        total += _times(w, source, scale, first, size, start, WIDTH, FP8)
    tl.store(results + rank * hidden + at, total.to(results.dtype.element_ty), inside)


WEIGHTS = ("gate_up", "down", "shared_gate_up", "shared_down")


@table.kernel(
    "shared_moe",
    when=(
        floats("x"),
        *map(is_param, WEIGHTS),
        plain_or_fp8(*WEIGHTS),
        whole_blocks("gate_up", 1, 256),
        whole_blocks("shared_gate_up", 0, 256),
        at_most("ids", 2, 64),
    ),
    quantised=True,
)
def shared_moe(
    op: Op,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
) -> torch.Tensor:
    """One token by matrix times vector, more grouped by expert."""
    rows, k = x.reshape(-1, x.shape[-1]).contiguous(), ids.shape[-1]
    tokens, hidden = rows.shape
    weights, ids, gate = weights.contiguous(), ids.contiguous(), gate.contiguous()
    if tokens > 1:
        return shared_moe_grouped(rows, weights, ids, gate, gate_up, down, shared_gate_up, shared_down).view(x.shape)
    intermediate, shared = down.shape[2], shared_down.shape[1]
    room, fp8 = max(intermediate, shared), isinstance(gate_up, QuantizedArray)
    inner, results, y = rows.new_empty(k + 1, room), rows.new_empty(k + 1, hidden), torch.empty_like(rows)
    step = ROWS if fp8 else ROWS // 2
    sizes = (k, hidden, intermediate, shared, room)
    width, inner_width = min(LONGEST, power(hidden)), min(LONGEST, power(room))
    _inner[(triton.cdiv(room, step), k + 1)](
        rows,
        ids,
        *parts(gate_up),
        *parts(shared_gate_up),
        inner,
        *sizes,
        ROWS=step,
        WIDTH=width,
        FP8=fp8,
        num_warps=WARPS,
    )
    _outer[(triton.cdiv(hidden, OUTPUTS), k + 1)](
        inner,
        ids,
        *parts(down),
        *parts(shared_down),
        results,
        *sizes,
        ROWS=OUTPUTS,
        WIDTH=inner_width,
        FP8=fp8,
        num_warps=WARPS,
    )
    combine(results, weights, gate, results[k:], y, (k + 1) * hidden, (k + 1) * hidden)
    return y.view(x.shape)
