"""The torch rules of serving forms: all sequences at once where they have as many tokens, else one after the other.

The first kind traces into one graph; the second needs the lengths on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaloom.ops.serving import pieces, sequence_bounds


def run_packed_torch(
    torch: Any, op: Any, sequence: Sequence[Any], fixed: Sequence[Any], pool: Any, out: Any, layout: dict[str, Any]
) -> tuple[Any, Any]:
    """``deltaloom.ops.serving.run_packed`` with torch; ``out`` holds zeros."""
    reads, writes = layout["read_slots"], layout["write_slots"]
    starts = layout.get("query_starts")
    if starts is None:
        return _uniform(torch, op, sequence, fixed, pool, reads, writes)
    new_pool = pool.clone()
    bounds = sequence_bounds(out.shape[1], reads.shape[0], starts)
    slots = writes.tolist()
    for read, start, stop in zip(reads.tolist(), bounds, bounds[1:]):
        state = pool[read : read + 1] if read >= 0 else torch.zeros_like(pool[:1])
        for piece in pieces(start, stop, slots):
            now = slice(piece.start, piece.stop)
            out[:, now], state = op.torch(torch, *(x[:, now] for x in sequence), *fixed, state)
            if piece.slot >= 0:
                new_pool[piece.slot] = state[0]
    return out, new_pool


def _uniform(
    torch: Any, op: Any, sequence: Sequence[Any], fixed: Sequence[Any], pool: Any, reads: Any, writes: Any
) -> tuple[Any, Any]:
    """Token by token over a batch of sequences. What is not to be written goes to a slot behind the others."""
    seqs, slots = reads.shape[0], pool.shape[0]
    each = writes.shape[0] // seqs
    batch = [x[0].unflatten(0, (seqs, each)) for x in sequence]
    fresh = (reads < 0)[(..., *[None] * (pool.dim() - 1))]
    state = torch.where(fresh, torch.zeros((), dtype=pool.dtype, device=pool.device), pool[reads.clamp(min=0)])
    target = torch.where(writes < 0, slots, writes).unflatten(0, (seqs, each))
    new_pool = torch.cat([pool, pool[:1]])
    outs = []
    for token in range(each):
        out, state = op.torch(torch, *(x[:, token : token + 1] for x in batch), *fixed, state)
        new_pool[target[:, token]] = state
        outs.append(out)
    return torch.cat(outs, dim=1).flatten(0, 1)[None], new_pool[:slots]


def paged_attention_torch(
    torch: Any, op: Any, new: Sequence[Any], pools: Sequence[Any], layout: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Attention of ``new`` (q, k, v) over ``pools`` (keys, values); gives out and the pools with k and v written."""
    tables, contexts, starts = layout["block_tables"], layout["context_lengths"], layout.get("query_starts")
    seqs, tokens, size = contexts.shape[0], new[0].shape[1], pools[0].shape[2]
    if starts is None:
        each = tokens // seqs
        q, k, v = (x[0].unflatten(0, (seqs, each)) for x in new)
        columns = torch.arange(tables.shape[1] * size, device=tables.device)
        seen = columns < contexts[:, None]
        caches = [_gathered(torch, pool, tables, seen) for pool in pools]
        valid = torch.cat([seen, torch.ones_like(seen[:, :1]).expand(seqs, each)], dim=1)
        out = op.torch(torch, q, k, v, *caches, valid)[0].flatten(0, 1)[None]
        rows = torch.arange(seqs, device=tables.device).repeat_interleave(each)
        positions = (contexts[:, None] + torch.arange(each, device=tables.device)).flatten()
    else:
        bounds = sequence_bounds(tokens, seqs, starts)
        out = torch.zeros_like(new[0][..., :1]).expand(*new[0].shape[:3], new[2].shape[3]).clone()
        for row, (past, start, stop) in enumerate(zip(contexts.tolist(), bounds, bounds[1:])):
            if start < stop:
                used = tables[row : row + 1, : -(-past // size)]
                caches = [_in_order(pool[used])[:, :, :past] for pool in pools]
                out[:, start:stop] = op.torch(torch, *(x[:, start:stop] for x in new), *caches)[0]
        lengths = starts[1:] - starts[:-1]
        rows = torch.arange(seqs, device=tables.device).repeat_interleave(lengths)
        positions = contexts[rows] + torch.arange(bounds[-1], device=tables.device) - starts[rows]
    blocks, places = tables[rows, positions // size], positions % size
    written = []
    for pool, x in zip(pools, new[1:], strict=True):
        written.append(pool.clone())
        written[-1][blocks, :, places] = x[0, : len(rows)]
    return out, written[0], written[1]


def _gathered(torch: Any, pool: Any, tables: Any, seen: Any) -> Any:
    """The blocks of every sequence as [seqs, heads, columns, width], 0 where they are not ``seen`` [seqs, columns]."""
    zero = torch.zeros((), dtype=pool.dtype, device=pool.device)
    return torch.where(seen[:, None, :, None], _in_order(pool[tables.clamp(min=0)]), zero)


def _in_order(blocks: Any) -> Any:
    """[seqs, blocks, heads, places, width] -> [seqs, heads, blocks * places, width]."""
    return blocks.transpose(1, 2).flatten(2, 3)
