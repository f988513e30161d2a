"""Matrix products: cuBLAS where it is best, own kernels for few rows and for FP8 weights.

x [..., in], weight [out, in]. Floor: the weight read once, out in itemsize bytes. For one row the sum is taken on the ordinary
units, for some rows tiles go to the matrix units; FP8 codes are widened in registers, so only a byte a weight crosses memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear as torch_linear

from deltaloom.backends.cuda.quantized import BLOCK, parts, plain_or_fp8, weights_times_rows
from deltaloom.backends.cuda.table import floats, interpreted, power, table, zeros
from deltaloom.graph.op import Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.ops.quantized import plain_tensor
from deltaloom.passes.kernel import absent, is_param

FEW = 64
"""Rows up to which an FP8 weight is multiplied as it lies; for more it is widened once."""

SMALL = 1 << 21
"""Elements of a weight up to which some rows are no work for cuBLAS, which takes two launches for it."""

FEW_BYTES, STAGES = 256, 3
"""Bytes of a row that a program of ``_few_rows`` reads at once, and how many such tiles are under way."""

PROGRAMS, MOST_PARTS = 384, 8
"""About how many programs of ``_few_rows`` there should be, and into how many parts columns are cut for it at most."""

LONGEST = 2048
"""Columns of a row that a program reads at once."""

ONE_SHOT = 8192
"""Bytes of weights that a program of ``_one_row`` reads at once."""


@triton.jit
def _one_row(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    """ROWS elements of y = weight x."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = row < rows
    blocks = scale + (tl.program_id(0) * ROWS // 128) * ((width + 127) // 128)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    w = tl.load(weight + place, inside[:, None] & (column < width)[None, :], other=0.0)
    f = tl.load(x + column, column < width, other=0.0).to(tl.float32)
    if FP8:
        f = f * tl.load(blocks + column // 128, column < width, other=0.0)
    total = tl.sum(w.to(tl.float32) * f[None, :], 1)
    for start in range(WIDTH, width, WIDTH):
        known = start + column < width
        w = tl.load(weight + place + start, inside[:, None] & known[None, :], other=0.0)
        f = tl.load(x + start + column, known, other=0.0).to(tl.float32)
        if FP8:
            f = f * tl.load(blocks + (start + column) // 128, known, other=0.0)
        total += tl.sum(w.to(tl.float32) * f[None, :], 1)
    tl.store(y + row, total.to(y.dtype.element_ty), inside)


@triton.jit
def _few_rows(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    y: tl.tensor,
    sums: tl.tensor,
    done: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """ROWS columns of y [count, rows] = x [count, width] weight^T, SPLIT programs for each: whichever ends last adds their ``sums``
    [SPLIT, count, rows], in order, and leaves ``done`` at 0 as it found it."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    row, at = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COUNT)
    inside, real = row < rows, at < count
    blocks = scale + (tile * ROWS // 128) * ((width + 127) // 128)
    total = tl.zeros([ROWS, COUNT], tl.float32)
    each = tl.cdiv(tl.cdiv(width, SPLIT), WIDTH) * WIDTH
    for start in range(piece * each, tl.minimum(width, (piece + 1) * each), WIDTH):
        column = start + tl.arange(0, WIDTH)
        known = column < width
        f = tl.load(x + at[None, :] * width + column[:, None], real[None, :] & known[:, None], other=0.0)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        w = tl.load(weight + place, inside[:, None] & known[None, :], other=0.0)
        part = weights_times_rows(w, f, WIDEN)
        total += part * tl.load(blocks + start // 128) if FP8 else part
    place, there = at[None, :] * rows + row[:, None], real[None, :] & inside[:, None]
    if SPLIT == 1:
        tl.store(y + place, total.to(y.dtype.element_ty), there)
    else:
        tl.store(sums + piece * count * rows + place, total, there)
        tl.debug_barrier()
        if tl.atomic_add(done + tile, 1) == SPLIT - 1:
            whole = tl.zeros([ROWS, COUNT], tl.float32)
            for number in tl.static_range(SPLIT):
                whole += tl.load(sums + number * count * rows + place, there, other=0.0, cache_modifier=".cg")
            tl.store(y + place, whole.to(y.dtype.element_ty), there)
            tl.store(done + tile, 0)


def plain_block(width: int, itemsize: int) -> int:
    """Columns of a tile of a plain weight: no fewer than 16, as the matrix units want them."""
    return max(16, min(FEW_BYTES // itemsize, power(width)))


def split_of(tiles: int, count: int, blocks: int) -> int:
    """Into how many parts columns are cut, so that there are programs for all units; no part is shorter than two blocks."""
    wanted = (PROGRAMS if count <= 16 else PROGRAMS // 2) // tiles
    return power(max(1, min(wanted, blocks // 2, MOST_PARTS)) + 1) // 2


@table.kernel("linear", when=(absent("bias"), floats("x"), plain_or_fp8("weight")), quantised=True)
def linear(op: Op, x: torch.Tensor, weight: torch.Tensor | QuantizedArray) -> torch.Tensor:
    """One row: own kernel. More: cuBLAS; FP8 weights by the matrix units up to 64 rows, then widened as a whole."""
    flat = x.reshape(-1, x.shape[-1])
    count, width = flat.shape
    rows, fp8 = weight.shape[0], isinstance(weight, QuantizedArray)
    if count > FEW:
        return torch_linear(x, plain_tensor(torch, weight, x.dtype))
    if count > 1 and not fp8 and rows * width > SMALL:
        return torch_linear(x, weight)  # type: ignore[arg-type]
    flat = flat.contiguous()
    y = x.new_empty(count, rows)
    if count == 1:
        block = min(LONGEST, power(width))
        step = max(1, min(128, ONE_SHOT // (block * (1 if fp8 else x.element_size()))))
        grid = (triton.cdiv(rows, step),)
        _one_row[grid](flat, *parts(weight), y, rows, width, ROWS=step, WIDTH=block, FP8=fp8, num_warps=4 if fp8 else 2)
    else:
        step = 64 if fp8 else 16
        tiles, block = triton.cdiv(rows, step), BLOCK if fp8 else plain_block(width, x.element_size())
        split = split_of(tiles, count, triton.cdiv(width, block))
        sums = torch.empty(split, count, rows, dtype=torch.float32, device=x.device) if split > 1 else y
        _few_rows[(tiles, split)](
            flat,
            *parts(weight),
            y,
            sums,
            zeros(x.device, power(tiles)),
            count,
            rows,
            width,
            COUNT=max(8, power(count)),
            ROWS=step,
            WIDTH=block,
            SPLIT=split,
            FP8=fp8,
            WIDEN=interpreted(),
            num_warps=4 if fp8 else 2,
            num_stages=STAGES,
        )
    return y.view(*x.shape[:-1], rows)


@table.kernel("linear", when=(is_param("weight"),), quantised=True)
def linear_torch(op: Op, x: torch.Tensor, weight: torch.Tensor | QuantizedArray, bias: torch.Tensor | None = None) -> torch.Tensor:
    """By cuBLAS, for any dtype, form and bias; a weight in another form is widened at each call."""
    return torch_linear(x, plain_tensor(torch, weight, x.dtype), bias)
