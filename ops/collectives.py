"""Ops of a graph that every rank of a mesh axis runs: exchanges between the ranks, and what depends on the rank.

One rank alone knows only its own arrays, so the meaning of an exchange is ``together``: the arrays of all ranks in, those of all
ranks out. With one rank it is the identity, and that is all that ``reference`` can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import GraphError, require
from deltaloom.graph.op import Array, Case, Cost, Draw, Op
from deltaloom.graph.quantized import QuantizedArray, joined
from deltaloom.graph.types import QuantType, TensorType
from deltaloom.ops.precision import wide
from deltaloom.ops.signature import floating


class Collective(Op):
    """An exchange between the ``ranks`` of the mesh axis ``mesh``."""

    mesh: str
    ranks: int

    def together(self, arrays: Sequence[Array]) -> list[Array]:
        """What every rank has afterwards, from what every rank gives."""
        raise GraphError(f"collective {self.name} does not say what it does")

    def reference(self, x: Array) -> Array:
        self._alone()
        return self.together([x])[0]

    def torch(self, torch: Any, x: Any) -> Any:
        self._alone()
        return x

    def _alone(self) -> None:
        require(
            self.ranks == 1,
            f"{self.name} over {self.ranks} ranks of '{self.mesh}' cannot run in one rank alone; run the graph in lock step, "
            "with deltaloom.runtime.lockstep",
        )

    def _check(self) -> None:
        require(self.ranks >= 1, f"{self.name} over '{self.mesh}' has {self.ranks} ranks, expected at least 1")


class AllReduce(Collective):
    """Every rank gets the sum of all ranks' x, added in float32 in the order of the ranks and rounded once."""

    name: ClassVar[str] = "all_reduce"
    sharding: ClassVar[str] = "+... -> ..."

    def infer(self, x: TensorType) -> TensorType:
        self._check()
        floating("x", x)
        return x

    def together(self, arrays: Sequence[Array]) -> list[Array]:
        return [_sum(arrays)] * len(arrays)

    def cost(self, x: TensorType) -> Cost:
        return Cost((self.ranks - 1) * x.elements(), self.moved_bytes(x))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls("tp", 1), (draw.normal(draw.size(), draw.size()),))


class AllGather(Collective):
    """Every rank gets all ranks' x side by side along ``axis``; of ``copies`` neighbours, which have the same x, the first."""

    name: ClassVar[str] = "all_gather"
    axis: int
    copies: int = 1

    def infer(self, x: TensorType) -> TensorType:
        self._check()
        _has_axis(self.axis, x)
        divides = self.copies >= 1 and self.ranks % self.copies == 0
        require(divides, f"all_gather of {self.ranks} ranks has groups of {self.copies}, which do not divide them")
        return _scaled(x, self.axis, self.ranks // self.copies, 1)

    def factors(self, x: TensorType) -> str:
        return _fixed_axes(x, self.axis)

    def together(self, arrays: Sequence[Array]) -> list[Array]:
        return [np.concatenate(arrays[:: self.copies], axis=self.axis)] * len(arrays)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls("tp", 1, axis=draw.integer(0, 1)), (draw.normal(draw.size(), draw.size()),))


class ReduceScatter(Collective):
    """Rank r gets the r-th of ``ranks`` equal runs along ``axis`` of the sum that ``all_reduce`` gives."""

    name: ClassVar[str] = "reduce_scatter"
    axis: int

    def infer(self, x: TensorType) -> TensorType:
        self._check()
        floating("x", x)
        _has_axis(self.axis, x)
        return _scaled(x, self.axis, 1, self.ranks)

    def factors(self, x: TensorType) -> str:
        return _fixed_axes(x, self.axis)

    def together(self, arrays: Sequence[Array]) -> list[Array]:
        return np.split(_sum(arrays), self.ranks, axis=self.axis)

    def cost(self, x: TensorType) -> Cost:
        return Cost((self.ranks - 1) * x.elements(), self.moved_bytes(x))

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls("tp", 1, axis=draw.integer(0, 1)), (draw.normal(draw.size(), draw.size()),))


class AllToAll(Collective):
    """Rank r gets the r-th of equal runs along ``split_axis`` of every rank's x, side by side along ``concat_axis``."""

    name: ClassVar[str] = "all_to_all"
    split_axis: int
    concat_axis: int

    def infer(self, x: TensorType) -> TensorType:
        self._check()
        _has_axis(self.split_axis, x)
        _has_axis(self.concat_axis, x)
        return _scaled(_scaled(x, self.split_axis, 1, self.ranks), self.concat_axis, self.ranks, 1)

    def factors(self, x: TensorType) -> str:
        return _fixed_axes(x, self.split_axis, self.concat_axis)

    def together(self, arrays: Sequence[Array]) -> list[Array]:
        pieces = [np.split(array, self.ranks, axis=self.split_axis) for array in arrays]
        return [np.concatenate([own[rank] for own in pieces], axis=self.concat_axis) for rank in range(self.ranks)]

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        axes = draw.integer(0, 1), draw.integer(0, 1)
        return Case(cls("tp", 1, *axes), (draw.normal(draw.size(), draw.size()),))


class OfRank(Op):
    """What an array is on one of the ``ranks`` of the mesh axis ``mesh``; nothing is exchanged. A graph that all ranks share has
    no ``rank`` here; it is filled in where one of them runs, or loads its weights."""

    mesh: str
    ranks: int
    rank: int | None = None

    def on_rank(self, rank: int, x: Array) -> Array:
        """The result on ``rank``."""
        raise GraphError(f"op {self.name} does not say what it does")

    def reference(self, x: Array) -> Array:
        return self.on_rank(self._rank(), x)

    def _rank(self) -> int:
        if self.rank is None and self.ranks > 1:
            raise GraphError(f"{self.name} over {self.ranks} ranks of '{self.mesh}' does not know its rank; bind the graph to one")
        return self.rank or 0

    def _check(self) -> None:
        require(self.ranks >= 1, f"{self.name} over '{self.mesh}' has {self.ranks} ranks, expected at least 1")
        known = self.rank is None or 0 <= self.rank < self.ranks
        require(known, f"{self.name} is bound to rank {self.rank}, but '{self.mesh}' has ranks 0 to {self.ranks - 1}")


class Shard(OfRank):
    """This rank's runs of ``axis``.

    ``pieces`` (size, parts, outer) follow one another along the axis: each is divided into ``parts`` equal runs, of which rank r
    of n has number ``r // (n // (outer * parts)) % parts``."""

    name: ClassVar[str] = "shard"
    axis: int = 0
    pieces: tuple[tuple[int, int, int], ...] = ()

    def infer(self, x: TensorType) -> TensorType:
        self._check()
        _has_axis(self.axis, x)
        wanted = sum(size for size, _, _ in self.pieces)
        require(x.shape[self.axis] == wanted, f"axis {self.axis} of x {x} is not of size {wanted}, that of the pieces")
        for size, parts, outer in self.pieces:
            even = parts >= 1 and size % parts == 0 and outer >= 1 and self.ranks % (parts * outer) == 0
            require(even, f"a piece of {size} elements cannot be divided into {parts} (behind {outer}) over {self.ranks} ranks")
        self._check_blocks(x)
        local = sum(size // parts for size, parts, _ in self.pieces)
        return x.with_shape(*x.shape[: self.axis], local, *x.shape[self.axis + 1 :])

    def factors(self, x: TensorType) -> str:
        return _fixed_axes(x, self.axis)

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """Start and end of this rank's runs along the axis."""
        found, start = [], 0
        for size, parts, outer in self.pieces:
            run = rank // (self.ranks // (outer * parts)) % parts
            first = start + run * (size // parts)
            found.append((first, first + size // parts))
            start += size
        return found

    def on_rank(self, rank: int, x: Any) -> Any:
        """A view where the rank has one run; ``x`` may be quantised."""
        spans = self.spans(rank)
        if isinstance(x, QuantizedArray):
            parts = [x.part(self.axis, *span) for span in spans]
            return parts[0] if len(parts) == 1 else joined(parts, self.axis, np.concatenate)
        runs = [x[(slice(None),) * self.axis + (slice(*span),)] for span in spans]
        return runs[0] if len(runs) == 1 else np.concatenate(runs, axis=self.axis)

    def _check_blocks(self, x: TensorType) -> None:
        if not isinstance(x.dtype, QuantType):
            return
        for position in {position for rank in range(self.ranks) for span in self.spans(rank) for position in span}:
            border = position == x.shape[self.axis] or x.dtype.cuts(self.axis - x.rank, position)
            require(border, f"{x} cannot be divided at {position} of axis {self.axis}: that is inside a block of its scales")

    def torch(self, torch: Any, x: Any) -> Any:
        runs = [x.narrow(self.axis, start, stop - start) for start, stop in self.spans(self._rank())]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=self.axis)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        ranks = draw.choice(1, 2, 4)
        pieces = []
        for _ in range(draw.integer(1, 3)):
            parts = draw.choice(*(n for n in (1, 2, 4) if ranks % n == 0))
            outer = draw.choice(*(n for n in (1, 2, 4) if ranks % (parts * n) == 0))
            pieces.append((draw.size(5) * parts, parts, outer))
        op = cls("tp", ranks, rank=draw.integer(0, ranks - 1), axis=0, pieces=tuple(pieces))
        return Case(op, (draw.normal(sum(size for size, _, _ in pieces), draw.size()),))


class OnFirstRank(OfRank):
    """x on rank 0 and zeros on the others: a value that is whole as a summand."""

    name: ClassVar[str] = "on_first_rank"
    sharding: ClassVar[str] = "+... -> ..."

    def infer(self, x: TensorType) -> TensorType:
        self._check()
        floating("x", x)
        return x

    def on_rank(self, rank: int, x: Array) -> Array:
        return x if rank == 0 else np.zeros_like(x)

    def torch(self, torch: Any, x: Any) -> Any:
        return x if self._rank() == 0 else torch.zeros_like(x)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        ranks = draw.integer(1, 4)
        return Case(cls("tp", ranks, rank=draw.integer(0, ranks - 1)), (draw.normal(draw.size(), draw.size()),))


def _sum(arrays: Sequence[Array]) -> Array:
    total = wide(arrays[0])
    for array in arrays[1:]:
        total = total + wide(array)
    summed: Array = total.astype(arrays[0].dtype)
    return summed


def _has_axis(axis: int, x: TensorType) -> None:
    require(0 <= axis < x.rank, f"x {x} has no axis {axis}")


def _scaled(x: TensorType, axis: int, times: int, parts: int) -> TensorType:
    """``x`` with one axis ``times`` as long and divided by ``parts``."""
    size = x.shape[axis]
    if not isinstance(size, int) or size % parts:
        raise GraphError(f"axis {axis} of x {x} is not a known multiple of {parts}")
    return TensorType(x.plain_dtype, (*x.shape[:axis], size * times // parts, *x.shape[axis + 1 :]))


def _fixed_axes(x: TensorType, *fixed: int) -> str:
    """The sharding string of an op that leaves all axes alone but the ``fixed`` ones, which must stay whole."""
    before = [f"a{axis}!" if axis in fixed else f"a{axis}" for axis in range(x.rank)]
    after = [f"b{axis}!" if axis in fixed else f"a{axis}" for axis in range(x.rank)]
    return f"+{' '.join(before)} -> {' '.join(after)}"
