"""Decoding by recorded steps: the rows of a prefilled state move into pools, and the device goes from token to token by itself.

The host sees tokens one step late: while it looks at those of a step, the next is under way. A row that has ended then has taken
one step too many, whose token nobody gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from deltaloom.graph.op import Array
from deltaloom.passes.emit import Program
from deltaloom.passes.serving_layout import BLOCK_SIZE, ServingVariant
from deltaloom.runtime.executor import Executor
from deltaloom.runtime.pools import StatePools
from deltaloom.runtime.state import ModelState

FIRST_BLOCKS = 64
"""Blocks that a row has room for at first, unless its prompt needs more; twice as many when they are full."""


class Step(Protocol):
    """A step that a device takes by itself; see ``deltaloom.backends.cuda.step.DecodeStep``."""

    def set(self, name: str, values: Array) -> None:
        """Give an input values before the next step."""

    def free(self, row: int) -> None:
        """Let nobody use a row from the next step on."""

    def run(self) -> int:
        """Start a step and give its number."""

    def tokens(self, number: int) -> list[int]:
        """The tokens of a step, waited for; -1 for a row whose logits were not finite."""


@runtime_checkable
class RecordsSteps(Protocol):
    """A backend that records a decode step as a whole."""

    def decode_step(
        self,
        program: Program,
        weights: Mapping[str, tuple[Any, ...]],
        fixed: Mapping[str, tuple[Any, ...]],
        append: Mapping[str, tuple[Any, ...]],
        *,
        batch: int,
        max_blocks: int,
        allowed: int | None,
        sampled: bool,
    ) -> Step:
        """The step, recorded, for ``batch`` rows with tables of ``max_blocks`` blocks."""


def records(executor: Executor) -> bool:
    """Whether the programs of ``executor`` run on one backend that records steps."""
    return len(executor.ctx.backends) == 1 and isinstance(executor.ctx.backends[0], RecordsSteps)


class RecordedRows:
    """Rows that decode by recorded steps. Row r has slot r + 1, and block 1 + j rows + r for its positions from j block sizes on,
    so that a larger pool keeps all numbers."""

    def __init__(self, executor: Executor, state: ModelState, *, allowed: int | None, draws: Mapping[str, Array]) -> None:
        """The rows of ``state``, whose padding is left behind. ``draws``: the inputs of rows that are drawn by name; none where all
        take the likeliest token. Raises what compiling the serving program raises."""
        self._executor = executor
        self._program, self._weights = executor.bound(ServingVariant("decode", ("last_logits",)))
        self._rows = state.batch
        self._batch = 1 << (state.batch - 1).bit_length()
        starts = [0] * state.batch if state.valid is None else (~state.valid).sum(axis=1).tolist()
        self._lengths = [state.length - start for start in starts]
        self._live = set(range(state.batch))
        self._last: Callable[[], list[int]] = list
        self._allowed = allowed
        self._draws = draws
        self._blocks = max(FIRST_BLOCKS, 1 << (max(self._lengths) // BLOCK_SIZE).bit_length())
        self._pools = self._made_pools()
        self._adopt(state, starts)
        self._step = self._made_step()

    def steps(self, first: Sequence[int]) -> Iterator[list[int]]:
        """The tokens of one step after the other, in the order of the rows; ``first`` are those that the first step reads. Rows
        that were freed have any token."""
        self._set("token_ids", first, 0)
        self._last = lambda: list(first)
        before = self._run()
        while self._live:
            now = self._run()
            yield before()[: self._rows]
            before = now

    def free(self, row: int) -> None:
        """The row has ended."""
        self._live.discard(row)
        self._step.free(row)

    def _run(self) -> Callable[[], list[int]]:
        """Start a step; what is given waits for its tokens."""
        if max(self._lengths[row] for row in self._live) + 1 > self._blocks * BLOCK_SIZE:
            self._grow()
        for row in self._live:
            self._lengths[row] += 1
        self._last = partial(self._step.tokens, self._step.run())
        return self._last

    def _grow(self) -> None:
        """Twice the room: the pools are copied, and the step is recorded anew."""
        last, old = self._last(), self._pools
        self._blocks *= 2
        self._pools = self._made_pools()
        for prefix, group in old.fixed.items():
            for pool, before in zip(self._pools.fixed[prefix], group, strict=True):
                pool[: len(before)] = before
        self._step = self._made_step()
        self._set("token_ids", np.maximum(last[: self._rows], 0), 0)

    def _made_pools(self) -> StatePools:
        backends = {backend.name: backend for backend in self._executor.ctx.backends}
        return StatePools([self._program], backends, slots=self._batch + 1, blocks=1 + self._blocks * self._batch)

    def _made_step(self) -> Step:
        home: Any = self._executor.ctx.backends[0]
        step: Step = home.decode_step(
            self._program,
            self._weights,
            self._pools.fixed,
            self._pools.append,
            batch=self._batch,
            max_blocks=self._blocks,
            allowed=self._allowed,
            sampled=bool(self._draws),
        )
        self._step = step
        rows = np.arange(self._rows)
        tables = 1 + np.arange(self._blocks) * self._batch + rows[:, None]
        live = np.isin(rows, list(self._live))
        self._set("block_tables", tables * live[:, None], 0)
        self._set("context_lengths", np.asarray(self._lengths) * live, 0)
        self._set("positions", np.asarray(self._lengths) * live, 0)
        for name, idle in (("read_slots", -1), ("write_slots", 0)):
            self._set(name, np.where(live, rows + 1, idle), idle)
        for name, values in self._draws.items():
            self._set(name, values, 1)
        return step

    def _set(self, name: str, values: Sequence[int] | Array, idle: int) -> None:
        """An input of all rows, with ``idle`` for those beyond the last."""
        given = np.asarray(values)
        dtype = np.float64 if given.dtype.kind == "f" else np.int64
        full = np.full((self._batch, *given.shape[1:]), idle, dtype)
        full[: self._rows] = given[: self._rows]
        self._step.set(name, full)

    def _adopt(self, state: ModelState, starts: Sequence[int]) -> None:
        """Copy the states of the rows into slots and blocks."""
        for prefix, signature in self._program.by_prefix().items():
            fixed = dict(zip(state.fixed_names(prefix), state.fixed[prefix], strict=True))
            grown = {buffer.slot.name: buffer.data for buffer in state.buffers[prefix]}
            for slot, pool in zip(signature.fixed, self._pools.fixed[prefix], strict=True):
                if slot.name in fixed:
                    pool[1 : self._rows + 1] = fixed[slot.name]
                    continue
                for row, start in enumerate(starts):
                    entries = grown[slot.name][row][:, start : state.length].swapaxes(0, 1)
                    at = np.arange(len(entries))
                    blocks = (1 + at // BLOCK_SIZE * self._batch + row).tolist()
                    pool[blocks, :, (at % BLOCK_SIZE).tolist()] = entries
