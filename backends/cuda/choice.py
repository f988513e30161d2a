"""The end of a decode step: the likeliest token of each row, and the inputs of the next step.

logits [rows, vocab]. Floor: they are read once. Two launches: ``_best`` has a program for a part of a row, ``_advance`` one for a
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltaloom.backends.cuda.table import power

PART = 4096
"""Logits of a program."""


@triton.jit
def _best(
    logits: tl.tensor,
    values: tl.tensor,
    ids: tl.tensor,
    bad: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    allowed: tl.tensor,
    parts: tl.tensor,
    PART: tl.constexpr,
) -> None:
    """The largest logit of a part, the lowest id that has it, and how many logits are not finite."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row * stride + at, at < vocab, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    x = tl.where(finite & (at < allowed), x, float("-inf"))
    highest = tl.max(x, 0)
    place = row * parts + part
    tl.store(values + place, highest)
    tl.store(ids + place, tl.min(tl.where(x == highest, at, 2147483647), 0))
    tl.store(bad + place, tl.sum((finite == 0).to(tl.int32), 0))


@triton.jit
def _advance(
    values: tl.tensor,
    ids: tl.tensor,
    bad: tl.tensor,
    chosen: tl.tensor,
    kept: tl.tensor,
    broken_steps: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    context_lengths: tl.tensor,
    read_slots: tl.tensor,
    write_slots: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,
    GIVEN: tl.constexpr,
) -> None:
    """A row's token, or the one that was ``chosen`` already if ``GIVEN``, and its next step; a row that writes no slot stays."""
    row, at = tl.program_id(0), tl.arange(0, PARTS)
    place, known = row * parts + at, at < parts
    value = tl.load(values + place, known, other=float("-inf"))
    found = tl.load(ids + place, known, other=2147483647)
    broken = tl.sum(tl.load(bad + place, known, other=0), 0) > 0
    best = tl.min(tl.where(value == tl.max(value, 0), found, 2147483647), 0).to(tl.int64)
    if GIVEN:
        best = tl.load(chosen + row)
    tl.store(token_ids + row, best)
    tl.store(kept + row, tl.where(broken, -1, best))
    write = tl.load(write_slots + row)
    used = write > 0
    tl.store(broken_steps + row, tl.load(broken_steps + row) + (broken & used).to(tl.int64))
    tl.store(positions + row, tl.load(positions + row) + used.to(tl.int64))
    tl.store(context_lengths + row, tl.load(context_lengths + row) + used.to(tl.int32))
    tl.store(read_slots + row, tl.where(used, write, -1))


def advance(
    logits: torch.Tensor,
    allowed: int | None,
    chosen: torch.Tensor | None,
    kept: torch.Tensor,
    broken_steps: torch.Tensor,
    inputs: dict[str, torch.Tensor],
) -> None:
    """Choose a token of each row of ``logits`` [rows, vocab], the likeliest below ``allowed`` unless ``chosen`` says which, and
    move ``inputs`` on to the next step. ``kept`` gets the tokens, -1 where a logit is not finite; ``broken_steps`` int64 [rows]
    grows by one for each row in use where that is so."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids, bad = torch.empty(2, rows, parts, dtype=torch.int32, device=logits.device)
    limit = vocab if allowed is None else min(allowed, vocab)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    _best[(parts, rows)](logits, values, ids, bad, logits.stride(0), vocab, limit, parts, PART=PART, num_warps=4)
    order = ("token_ids", "positions", "context_lengths", "read_slots", "write_slots")
    _advance[(rows,)](
        values,
        ids,
        bad,
        kept if chosen is None else chosen,
        kept,
        broken_steps,
        *(inputs[name] for name in order),
        parts,
        PARTS=power(parts),
        GIVEN=chosen is not None,
        num_warps=1,
    )
