"""The inputs of a serving program from what each sequence does in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.op import Array

FRESH = -1
"""The slot that a new sequence reads: its states start at zero."""


@dataclass(frozen=True)
class Segment:
    """What one sequence does in a step: ``token_ids`` at the positions from ``context`` on. ``blocks`` hold its positions, in
    order; ``write_slots`` says by number of the token within the segment which slot gets the state after it."""

    token_ids: Sequence[int]
    context: int
    blocks: Sequence[int]
    read_slot: int = FRESH
    write_slots: Mapping[int, int] = field(default_factory=dict)
    logit_rows: Sequence[int] = (-1,)
    """Tokens within the segment whose logits a mixed program gives."""

    @property
    def end(self) -> int:
        """Positions after the step."""
        return self.context + len(self.token_ids)


def pack(
    segments: Sequence[Segment],
    *,
    block_size: int,
    tokens_each: int | None = None,
    seqs: int | None = None,
    tokens: int | None = None,
) -> dict[str, Array]:
    """The inputs by name: ``token_ids``, ``positions`` and those that ``deltaloom.ops.serving`` describes.

    ``tokens_each`` is that of the program (``ServingVariant.tokens_each``). ``seqs`` and ``tokens`` fill up to fixed sizes: with
    rows that work in block 0 and write no slot where all have as many tokens, else with empty sequences and tokens of nobody.
    Raises ``RequestError`` for segments that do not fit the program, lack blocks, or write what another one uses."""
    _check(segments, block_size, tokens_each)
    rows = list(segments)
    missing = max(0, (seqs or 0) - len(rows))
    idle = (0,) * (tokens_each or 0)
    rows += [Segment(idle, 0, (0,) * -(-len(idle) // block_size), logit_rows=())] * missing
    starts = np.cumsum([0, *(len(row.token_ids) for row in rows)])
    count = max(int(starts[-1]), tokens or 0)
    packed: dict[str, Array] = {
        "token_ids": np.zeros((1, count), np.int64),
        "positions": np.zeros((1, count), np.int64),
        "block_tables": np.zeros((len(rows), max(1, *(len(row.blocks) for row in rows))), np.int32),
        "context_lengths": np.asarray([row.context for row in rows], np.int32),
        "read_slots": np.asarray([row.read_slot for row in rows], np.int32),
        "write_slots": np.full(count, -1, np.int32),
    }
    for number, (row, start) in enumerate(zip(rows, starts.tolist())):
        now = slice(start, start + len(row.token_ids))
        packed["token_ids"][0, now] = row.token_ids
        packed["positions"][0, now] = np.arange(row.context, row.end)
        packed["block_tables"][number, : len(row.blocks)] = row.blocks
        for token, slot in row.write_slots.items():
            packed["write_slots"][start + token] = slot
    if tokens_each is None:
        chosen = [start + token % len(row.token_ids) for row, start in zip(rows, starts.tolist()) for token in row.logit_rows]
        packed["query_starts"] = starts.astype(np.int32)
        packed["logit_rows"] = np.asarray(chosen, np.int32)
    return packed


def _check(segments: Sequence[Segment], block_size: int, tokens_each: int | None) -> None:
    require(bool(segments), "a step needs at least one sequence", RequestError)
    written: dict[int, int] = {}
    users: dict[int, set[int]] = {}
    for number, row in enumerate(segments):
        count, who = len(row.token_ids), f"sequence {number} of the step"
        fits = count >= 1 if tokens_each is None else count == tokens_each
        require(fits, f"{who} has {count} tokens, expected {tokens_each or 'at least 1'}", RequestError)
        have = len(row.blocks) * block_size
        require(row.end <= have, f"{who} reaches position {row.end}, but its {len(row.blocks)} blocks end at {have}", RequestError)
        outside = [token for token in (*row.write_slots, *row.logit_rows) if not -count <= token < count]
        require(not outside, f"{who} names token {outside[:1]}, but has {count}", RequestError)
        for slot in row.write_slots.values():
            require(slot not in written, f"{who} writes slot {slot}, as sequence {written.get(slot)} does", RequestError)
            written[slot] = number
        for block in row.blocks[: -(-row.end // block_size)]:
            users.setdefault(block, set()).add(number)
    for number, row in enumerate(segments):
        writer = written.get(row.read_slot, number)
        shown = f"sequence {number} of the step reads slot {row.read_slot}, which sequence {writer} writes; write another slot"
        require(writer == number, shown, RequestError)
        for block in row.blocks[row.context // block_size : -(-row.end // block_size)]:
            others = sorted(users[block] - {number})
            shown = f"sequence {number} of the step writes to block {block}, which sequence {others[:1]} uses too; copy the block"
            require(not others, shown, RequestError)
