"""A careless server: random steps of many sequences over shared pools, each token checked against the sequence run alone.

It allocates at random, forks sequences from snapshots, drops what it no longer needs (which is then poisoned), and knows nothing of
how the programs work but what ``deltaloom.ops.serving`` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from deltaloom.graph.op import Array
from deltaloom.runtime.packing import FRESH, Segment
from deltaloom.testing.serving import ServedModel

Alone = Callable[[tuple[int, ...]], Array]
"""The logits [tokens, vocab] of a whole sequence, from the base program."""
Features = Callable[[Array], Mapping[str, Array]]
"""Further inputs of a step from its packed token ids."""


@dataclass
class Sequence:
    """A sequence, or a snapshot of one: its tokens so far, the slot of the state after them, and its blocks."""

    tokens: tuple[int, ...] = ()
    slot: int = FRESH
    blocks: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """What a sequence does in a step: its new tokens, how many of them stay, and after which of these a snapshot is kept."""

    sequence: Sequence
    new: tuple[int, ...]
    kept: int
    snapshot: int | None
    writes: dict[int, int]


class World:
    """``steps(n)`` takes n random steps and gives the largest deviation of a logit from the sequence run alone."""

    def __init__(
        self,
        model: ServedModel,
        alone: Alone,
        *,
        vocabulary: int,
        seed: int,
        slots: int = 48,
        blocks: int = 256,
        most: int = 40,
        features: Features | None = None,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = model
        self.pools = model.pools(slots=slots, blocks=blocks)
        self.recurrent = self.pools.slot_bytes > 0
        self.seen: Counter[str] = Counter()
        self._alone = alone
        self._vocabulary = vocabulary
        self._most = most
        self._features = features
        self._running: list[Sequence] = []
        self._snapshots: list[Sequence] = []
        self._users: dict[str, Counter[int]] = {"slots": Counter(), "blocks": Counter()}
        self._sizes = {"slots": slots, "blocks": blocks}

    def steps(self, count: int) -> float:
        """Take ``count`` steps."""
        worst = 0.0
        for _ in range(count):
            worst = max(worst, self._step())
            self._drop()
        return worst

    def _step(self) -> float:
        each = [None, 1, 1 + self._drafts()][self.rng.integers(3)]
        plans = [self._plan(sequence, each) for sequence in self._chosen()]
        segments = [self._segment(plan, each) for plan in plans]
        padding = {"tokens": 8} if each is None else {}
        padding = {"seqs": 1 + len(plans)} if self.rng.integers(3) == 0 else padding
        total = sum(len(plan.new) for plan in plans)
        self.seen[f"{'mixed' if each is None else each}"] += 1
        result = self._run(segments, each, padding, total)
        worst, at, chosen = 0.0, 0, 0
        for plan, segment in zip(plans, segments):
            want = self._alone((*plan.sequence.tokens, *plan.new))[len(plan.sequence.tokens) :]
            worst = max(worst, _distance(result["logits"][0, at : at + len(plan.new)], want))
            rows = list(segment.logit_rows) if each is None else range(len(plan.new))
            picked = result["last_logits"][0, chosen : chosen + len(rows)]
            worst = max(worst, _distance(picked, want[list(rows)]))
            at, chosen = at + len(plan.new), chosen + len(rows)
            self._commit(plan)
        return worst

    def _run(self, segments: list[Segment], each: int | None, padding: dict[str, int], total: int) -> dict[str, Array]:
        inputs: dict[str, Array] = {}
        if self._features is not None:
            ids = [token for segment in segments for token in segment.token_ids]
            rows = max(0, padding.get("seqs", 0) - len(segments)) * (each or 0)
            count = max(total + rows, padding.get("tokens", 0) if each is None else 0)
            inputs = dict(self._features(np.asarray([ids + [0] * (count - total)])))
        return self.model.step(
            self.pools, segments, tokens_each=each, inputs=inputs, seqs=padding.get("seqs"), tokens=padding.get("tokens")
        )

    def _drafts(self) -> int:
        return max(each for each in self.model.programs if each is not None) - 1

    def _chosen(self) -> list[Sequence]:
        """Up to four sequences: some that run, some that start from nothing or from a snapshot."""
        running = [s for s in self._running if len(s.tokens) < self._most]
        order = self.rng.permutation(len(running))[: self.rng.integers(0, 4)]
        chosen = [running[i] for i in order]
        while not chosen or (len(chosen) < 4 and self.rng.integers(2)):
            started = self._fork() if self._snapshots and self.rng.integers(3) else Sequence()
            self._running.append(started)
            chosen.append(started)
        return chosen

    def _fork(self) -> Sequence:
        """A sequence that goes on from a snapshot: it reads the same slot and the same full blocks, and copies a block begun."""
        base = self._snapshots[self.rng.integers(len(self._snapshots))]
        full, rest = divmod(len(base.tokens), self.model.block_size)
        blocks = base.blocks[:full]
        for block in blocks:
            self._users["blocks"][block] += 1
        if rest:
            copy = self._take("blocks")
            self.pools.copy_blocks([base.blocks[full]], [copy])
            blocks = [*blocks, copy]
        if base.slot != FRESH:
            self._users["slots"][base.slot] += 1
        self.seen["fork"] += 1
        return Sequence(base.tokens, base.slot, blocks)

    def _plan(self, sequence: Sequence, each: int | None) -> Plan:
        rng = self.rng
        count = each or int(rng.choice([1, 1, 2, 3, 5, 9, 17]))
        new = tuple(rng.integers(0, self._vocabulary, count).tolist())
        checked = 1 < count <= 5 and (each is not None or rng.integers(3) == 0)
        kept = int(rng.integers(1, count + 1)) if checked else count
        snapshot = int(rng.integers(kept)) if rng.integers(3) == 0 else None
        after = range(count) if checked else sorted({count - 1, *([] if snapshot is None else [snapshot])})
        writes = {token: self._slot(sequence, single=len(after) == 1) for token in after} if self.recurrent else {}
        self.seen["drafts refused"] += kept < count
        return Plan(sequence, new, kept, snapshot, writes)

    def _slot(self, sequence: Sequence, *, single: bool) -> int:
        """A free slot, or the sequence's own where nobody else refers to it."""
        own = sequence.slot
        if single and own != FRESH and self._users["slots"][own] == 1 and self.rng.integers(2):
            self._users["slots"][own] += 1
            self.seen["in place"] += 1
            return own
        return self._take("slots")

    def _segment(self, plan: Plan, each: int | None) -> Segment:
        sequence = plan.sequence
        needed = -(-(len(sequence.tokens) + len(plan.new)) // self.model.block_size)
        sequence.blocks += [self._take("blocks") for _ in range(needed - len(sequence.blocks))]
        count = len(plan.new)
        rows = tuple(sorted(set(self.rng.integers(0, count, self.rng.integers(0, 3)).tolist())))
        past, blocks = len(sequence.tokens), tuple(sequence.blocks)
        return Segment(plan.new, past, blocks, sequence.slot, plan.writes, rows if each is None else ())

    def _commit(self, plan: Plan) -> None:
        """Go on with the kept tokens: another slot, and no more blocks than they need."""
        sequence, size = plan.sequence, self.model.block_size
        tokens = (*sequence.tokens, *plan.new)
        length = len(sequence.tokens) + plan.kept
        if plan.snapshot is not None:
            end = len(sequence.tokens) + plan.snapshot + 1
            copy = Sequence(tokens[:end], plan.writes.get(plan.snapshot, FRESH), sequence.blocks[: -(-end // size)])
            self._users["slots"][copy.slot] += copy.slot != FRESH
            for block in copy.blocks:
                self._users["blocks"][block] += 1
            self._snapshots.append(copy)
        slot = plan.writes.get(plan.kept - 1, FRESH)
        released = [sequence.slot, *(s for s in plan.writes.values() if s != slot)]
        self._release("slots", [number for number in released if number != FRESH])
        needed = -(-length // size)
        self._release("blocks", sequence.blocks[needed:])
        sequence.tokens, sequence.slot, sequence.blocks = tokens[:length], slot, sequence.blocks[:needed]

    def _drop(self) -> None:
        """End sequences and forget snapshots until there is room for a step."""
        for group, keep in ((self._running, 5), (self._snapshots, 4)):
            while len(group) > keep or (group and self.rng.integers(6) == 0):
                gone = group.pop(int(self.rng.integers(len(group))))
                self._release("slots", [gone.slot] if gone.slot != FRESH else [])
                self._release("blocks", gone.blocks)

    def _take(self, kind: str) -> int:
        free = [number for number in range(1, self._sizes[kind]) if not self._users[kind][number]]
        number = int(self.rng.choice(free))
        self._users[kind][number] = 1
        return number

    def _release(self, kind: str, numbers: list[int]) -> None:
        for number in numbers:
            self._users[kind][number] -= 1
        freed = [number for number in numbers if not self._users[kind][number]]
        (self.pools.free_slots if kind == "slots" else self.pools.free_blocks)(freed)


def _distance(found: Array, want: Array) -> float:
    """The largest deviation; infinite where something is not finite."""
    return float(np.abs(found - want).max(initial=0.0)) if np.isfinite(found).all() else float("inf")
