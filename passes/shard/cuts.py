"""How an axis is divided over the ranks of one mesh axis, and how a division of factors is one of axes and back.

Rank numbers are read as digits. A piece that is divided in ``parts`` behind ``outer`` others is the same on ranks that differ
in the digits to the right of these: with 4 ranks, 2 parts behind 1 give ranks 0 and 1 the first half and ranks 2 and 3 the
second; 2 parts behind 2 give ranks 0 and 2 the first half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from deltaloom.graph.dims import Dim
from deltaloom.ops.factors import Axis, Term


class Piece(NamedTuple):
    """``size`` consecutive elements of an axis, divided into ``parts`` equal runs."""

    size: int
    parts: int = 1
    outer: int = 1

    @property
    def local(self) -> int:
        """The size on one rank."""
        return self.size // self.parts

    def run(self, rank: int, ranks: int) -> int:
        """Which of the runs ``rank`` of ``ranks`` has."""
        return rank // (ranks // (self.outer * self.parts)) % self.parts


Cut = tuple[Piece, ...]
"""The pieces of an axis, one after the other."""


def whole(cut: Cut) -> bool:
    """Whether nothing is divided."""
    return all(piece.parts == 1 for piece in cut)


def local_size(cut: Cut) -> int:
    """The size of the axis on one rank."""
    return sum(piece.local for piece in cut)


def complete(cut: Cut, ranks: int) -> bool:
    """Whether every rank has something that no other rank has."""
    return all(piece.parts == ranks for piece in cut)


def merged(cut: Sequence[Piece]) -> Cut:
    """The same division with neighbouring whole pieces as one."""
    found: list[Piece] = []
    for piece in cut:
        if piece.parts == 1 and found and found[-1].parts == 1:
            found[-1] = Piece(found[-1].size + piece.size)
        else:
            found.append(piece if piece.parts > 1 else Piece(piece.size))
    return tuple(found)


def join(first: Cut, second: Cut) -> Cut:
    """What is divided in one of the two is divided in the result; where they contradict each other, ``first`` holds."""
    left, right, found = list(first), list(second), []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        size = min(a.size, b.size)
        if (a.size > size and a.parts > 1) or (b.size > size and b.parts > 1) or (a.parts > 1 and b.parts > 1 and a != b):
            return first
        if a.size > size:
            left.insert(0, Piece(a.size - size))
        if b.size > size:
            right.insert(0, Piece(b.size - size))
        found.append(_resized(a if a.parts > 1 else b, size))
    return merged(found)


def _resized(piece: Piece, size: int) -> Piece:
    """The piece with another size; a divided one keeps its own."""
    return piece if piece.parts > 1 else Piece(size)


def disjoint(first: Cut, second: Cut) -> bool:
    """Whether the two go by different digits of the rank, so that both can divide one tensor."""
    pairs = [(a, b) for a in first for b in second if a.parts > 1 and b.parts > 1]
    return all(a.outer * a.parts <= b.outer or b.outer * b.parts <= a.outer for a, b in pairs)


@dataclass(frozen=True)
class Division:
    """Which factors of one node are divided, and how; ``sizes`` of all of its factors."""

    sizes: Mapping[str, Dim]
    cuts: Mapping[str, Cut]

    def axis(self, axis: Axis) -> Cut | None:
        """How an axis of these factors is divided: ``()`` if it stays whole, None if no division of it says that."""
        if not any(f in self.cuts for term in axis for f in term):
            return ()
        pieces: list[Piece] = []
        for term in axis:
            found = self._term(term)
            if found is None:
                return None
            pieces += found
        return merged(pieces)

    def _term(self, term: Term) -> Cut | None:
        sizes = self._numbers(term)
        if sizes is None:
            return None
        cut = [position for position, factor in enumerate(term) if factor in self.cuts]
        if not cut:
            return (Piece(prod(sizes)),)
        first = cut[0]
        pieces = self.cuts[term[first]]
        for later in cut[1:]:
            joined = _behind(pieces, self.cuts[term[later]], prod(sizes[first + 1 : later]))
            if joined is None:
                return None
            pieces, first = joined, later
        inner, times = prod(sizes[first + 1 :]), prod(sizes[: cut[0]])
        return tuple(piece._replace(size=piece.size * inner) for piece in pieces) * times

    def _numbers(self, term: Term) -> list[int] | None:
        sizes = [self.sizes[f] for f in term]
        numbers = [size for size in sizes if isinstance(size, int)]
        return numbers if len(numbers) == len(sizes) else None


def _behind(outer: Cut, inner: Cut, between: int) -> Cut | None:
    """Two neighbouring factors as one: the first has one element a rank, and the second divides the ranks that share it."""
    if len(outer) != 1 or len(inner) != 1 or outer[0].local != 1 or between != 1:
        return None
    a, b = outer[0], inner[0]
    return (Piece(a.size * b.size, a.parts * b.parts, a.outer),) if b.outer == a.outer * a.parts else None


def factor_cuts(axis: Axis, cut: Cut, sizes: Mapping[str, Dim]) -> dict[str, Cut] | None:
    """How the factors of an axis must be divided so that it is divided by ``cut``; None if no division of them says that."""
    rest, found = list(cut), dict[str, Cut]()
    for term in axis:
        numbers = [size for size in (sizes[f] for f in term) if isinstance(size, int)]
        if len(numbers) < len(term):
            return None
        pieces = _take(rest, prod(numbers))
        own = None if pieces is None else _of_term(term, pieces, numbers)
        if own is None:
            return None
        for factor, division in own.items():
            if found.setdefault(factor, division) != division:
                return None
    return found


def _take(rest: list[Piece], size: int) -> Cut | None:
    """Remove the pieces of the first ``size`` elements; None where a divided one would have to be broken."""
    taken = []
    while size:
        piece = rest.pop(0)
        if piece.size > size:
            if piece.parts > 1:
                return None
            rest.insert(0, Piece(piece.size - size))
            piece = Piece(size)
        taken.append(piece)
        size -= piece.size
    return tuple(taken)


def _of_term(term: Term, pieces: Cut, sizes: list[int]) -> dict[str, Cut] | None:
    if whole(pieces):
        return {}
    if len(term) == 1:
        return {term[0]: merged(pieces)}
    if len(pieces) == 1:
        return _digits(term, pieces[0], sizes)
    count, inner = sizes[0], prod(sizes[1:])
    repeated = pieces[: len(pieces) // count] * count == pieces
    if repeated and len(pieces) % count == 0:
        return _of_term(term[1:], pieces[: len(pieces) // count], sizes[1:])
    if all(p.size % inner == 0 and p.size // inner % p.parts == 0 for p in pieces):
        return {term[0]: merged([p._replace(size=p.size // inner) for p in pieces])}
    return None


def _digits(term: Term, piece: Piece, sizes: list[int]) -> dict[str, Cut] | None:
    """One divided piece: the first factor takes as many of the parts as it can, the next one what is left."""
    found: dict[str, Cut] = {}
    left, outer = piece.parts, piece.outer
    for factor, size in zip(term, sizes):
        if left == 1 or size == 1:
            continue
        parts = left if size % left == 0 else size if left % size == 0 else 0
        if not parts:
            return None
        found[factor] = (Piece(size, parts, outer),)
        left, outer = left // parts, outer * parts
    return found if left == 1 else None
