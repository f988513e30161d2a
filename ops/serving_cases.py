"""Generated steps of a server, for the cases of serving forms: prefill, chunks, single tokens, drafts, padding rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltaloom.graph.op import Array, Draw


@dataclass(frozen=True)
class Steps:
    """The shape of one step: tokens of every sequence, how many tokens of padding follow, and which rows are padding.

    ``uniform``: every sequence has as many tokens, so that there are no ``query_starts``."""

    lengths: tuple[int, ...]
    extra: int
    uniform: bool
    scratch: tuple[bool, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding included."""
        return sum(self.lengths) + self.extra

    @property
    def starts(self) -> list[int]:
        """Where the sequences begin, and the last one ends."""
        return [0, *np.cumsum(self.lengths).tolist()]

    def query_starts(self) -> list[Array]:
        """The last input of a serving form: nothing for a uniform step."""
        return [] if self.uniform else [np.asarray(self.starts, np.int32)]

    def alike(self, *arrays: Array) -> list[Array]:
        """``arrays`` [1, tokens, ...] with the same numbers in all padding rows, which write to the same place."""
        rows = [start for start, scratch in zip(self.starts, self.scratch) if scratch]
        made = [array.copy() for array in arrays]
        for array in made:
            for row in rows[1:]:
                array[:, row : row + self.lengths[0]] = array[:, rows[0] : rows[0] + self.lengths[0]]
        return made


def draw_steps(draw: Draw) -> Steps:
    """A step of 1 to 4 sequences: as many tokens for each (then with padding rows at the end), or any mix."""
    seqs = draw.integer(1, 4)
    if draw.choice(False, True):
        each, padding = draw.choice(1, 2, 5), draw.integer(0, seqs - 1)
        scratch = tuple(row >= seqs - padding for row in range(seqs))
        return Steps((each,) * seqs, 0, True, scratch)
    lengths = [draw.choice(1, 2, 3, 5, 1, 17, 65, 0) for _ in range(seqs)]
    extra = draw.integer(0, 2)
    return Steps(tuple(lengths), max(extra, 1 - sum(lengths)), False, (False,) * seqs)


@dataclass(frozen=True)
class Slots:
    """Which slots of a pool of ``count`` a step reads and writes."""

    count: int
    read: Array
    write: Array


def draw_slots(draw: Draw, steps: Steps) -> Slots:
    """Reads of shared, own and no slots; writes after the last token, after every token, after any tokens or none."""
    tokens, starts = steps.tokens, steps.starts
    count = tokens + 3 + draw.integer(1, 3)
    read = np.where(steps.scratch, -1, draw.integers(-1, 3, len(steps.lengths)))
    read[(read == 0) & np.any(steps.scratch)] = -1
    free = 1 + np.argsort(draw.uniform(0.0, 1.0, count - 1))
    free = free[~np.isin(free, read)]
    kind = draw.choice("last", "every", "any", "in place")
    write = np.full(tokens, -1)
    chosen = draw.integers(0, 1, tokens)
    for row, (start, stop) in enumerate(zip(starts, starts[1:])):
        for token in range(start, stop):
            last = token == stop - 1
            if last and kind == "in place" and read[row] > 0 and np.sum(read == read[row]) == 1:
                write[token] = read[row]
            elif steps.scratch[row]:
                write[token] = 0 if last else -1
            elif kind == "every" or (kind == "any" and chosen[token]) or (kind == "last" and last):
                write[token] = free[token]
    return Slots(count, read.astype(np.int32), write.astype(np.int32))


@dataclass(frozen=True)
class Blocks:
    """Pools of ``count`` blocks of ``size`` places: the tables of a step and the positions before it."""

    count: int
    size: int
    tables: Array
    contexts: Array


def draw_blocks(draw: Draw, steps: Steps) -> Blocks:
    """Blocks in any order; full ones at the start may be shared by all sequences. Padding rows have block 0, which is large enough
    for them. Table entries that nobody looks at are -1."""
    size = 16 if any(steps.scratch) else draw.choice(16, 1, 2, 4)
    contexts = [draw.choice(0, 1, 7, size - 1, size, 2 * size + 1) for _ in steps.lengths]
    contexts = [0 if scratch else context for context, scratch in zip(contexts, steps.scratch)]
    ends = [context + length for context, length in zip(contexts, steps.lengths)]
    needed = [-(-end // size) for end in ends]
    count = 1 + sum(needed) + draw.integer(1, 2)
    free = iter((1 + np.argsort(draw.uniform(0.0, 1.0, count - 1))).tolist())
    tables = np.full((len(ends), max(needed) + draw.integer(1, 2)), -1)
    prefix: list[int] = []
    share = draw.choice(False, True)
    for row, blocks in enumerate(needed):
        full = contexts[row] // size
        own = [0] * blocks if steps.scratch[row] else [next(free) for _ in range(blocks)]
        if share and not steps.scratch[row]:
            common = min(full, len(prefix))
            own[:common] = prefix[:common]
            prefix = own[:full] if full > len(prefix) else prefix
        tables[row, :blocks] = own
    return Blocks(count, size, tables.astype(np.int32), np.asarray(contexts, np.int32))
