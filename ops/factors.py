"""The factor notation of sharding strings: which axes of inputs and outputs are one and the same factor.

``"+... i, o i, +o -> ... o"`` (linear): operands are separated by commas, inputs and outputs by ``->``, axes by spaces.
A factor that occurs in several operands is cut in all of them; an output without it is then the same on every rank. One
that no output has is summed over: every rank gives a partial sum. ``f!`` must stay whole.

``+`` marks summands: the op is linear in these inputs together, the others held fixed. So partial sums in all of them give
partial sums of the result, and one that is whole counts on one rank and as zero on the others.

``(h r)`` is one axis made of factors, the first one the slowest; a number is a factor of that size and stays whole.
``(q|k|v)`` is one axis that has these pieces one after the other. ``...`` stands for any number of axes. An axis of size 1 is
never cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from deltaloom.graph.dims import Dim
from deltaloom.graph.errors import GraphError, require

Term = tuple[str, ...]
"""The factors of a piece of an axis, the slowest first."""
Axis = tuple[Term, ...]
"""The pieces of one axis, mostly one."""


@dataclass(frozen=True)
class Operand:
    """One input or output: its axes, and whether it is a summand (``+``)."""

    axes: tuple[Axis, ...]
    added: bool = False

    def has(self, factor: str) -> bool:
        """Whether ``factor`` is in an axis."""
        return bool(self.places(factor))

    def places(self, factor: str) -> list[tuple[int, int]]:
        """The axes, and the pieces of these, that ``factor`` is in, by number."""
        pieces = [(axis, piece, term) for axis, terms in enumerate(self.axes) for piece, term in enumerate(terms)]
        return [(axis, piece) for axis, piece, term in pieces if factor in term]


@dataclass(frozen=True)
class Factors:
    """A parsed sharding string."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    whole: frozenset[str]

    @property
    def cuttable(self) -> tuple[str, ...]:
        """The factors that may be divided over ranks, in the order of their first use."""
        found = [f for operand in self.inputs for axis in operand.axes for term in axis for f in term]
        return tuple(f for f in dict.fromkeys(found) if f not in self.whole and not f.isdigit())

    def alternatives(self, first: str, second: str) -> bool:
        """Whether the two meet in different pieces of an axis and nowhere else, so that no element has to do with both."""
        met = False
        for operand in (*self.inputs, *self.outputs):
            for (axis, a), (other, b) in product(operand.places(first), operand.places(second)):
                if axis != other or a == b:
                    return False
                met = True
        return met

    def summed(self, factor: str) -> bool:
        """Whether ranks that share ``factor`` give partial sums."""
        return not any(operand.has(factor) for operand in self.outputs)

    def sizes(self, inputs: Sequence[Sequence[Dim]], outputs: Sequence[Sequence[Dim]]) -> dict[str, Dim]:
        """The size of every factor, from the shapes of all operands. Raises ``GraphError`` where they do not tell it."""
        shapes = zip((*self.inputs, *self.outputs), (*inputs, *outputs))
        rest = [pair for operand, shape in shapes for pair in zip(operand.axes, shape, strict=True)]
        sizes: dict[str, Dim] = {f: int(f) for axis, _ in rest for term in axis for f in term if f.isdigit()}
        for (term, *more), size in rest:
            if not more and len(term) == 1 and sizes.get(term[0], 1) == 1:
                sizes[term[0]] = size
        products: dict[frozenset[str], Dim] = {}
        while unknown := sorted({f for axis, _ in rest for term in axis for f in term if f not in sizes}):
            if not any(_solve(axis, size, sizes, products) for axis, size in rest):
                raise GraphError(f"the factors {' and '.join(unknown)} of one axis have no size of their own elsewhere")
        return sizes


def _solve(axis: Axis, size: Dim, sizes: dict[str, Dim], products: dict[frozenset[str], Dim]) -> bool:
    """Put the one unknown factor of an axis into ``sizes``, or the one unknown product of factors into ``products``; False where
    there is none, or more."""
    open_ = [frozenset(f for f in term if f not in sizes) for term in axis]
    unknown = {names for names in open_ if names and names not in products}
    if len(unknown) != 1:
        return False
    (names,) = unknown
    times, rest = 0, size
    for term, own in zip(axis, open_):
        known = prod((sizes[f] for f in term if f in sizes), start=1)
        if own != names:
            rest = rest - known * products.get(own, 1)
        elif isinstance(known, int):
            times += known
    require(times > 0, f"the size of factor {' '.join(sorted(names))} cannot be told from an axis of {size}")
    products[names] = rest // times
    if len(names) == 1:
        sizes.update(dict.fromkeys(names, products[names]))
    return True


@lru_cache(maxsize=4096)
def parse_factors(text: str, ranks_in: tuple[int, ...], ranks_out: tuple[int, ...]) -> Factors:
    """Read a sharding string for inputs and outputs of the given numbers of axes; absent optional inputs are left out.
    Raises ``GraphError``."""
    left, arrow, right = text.partition("->")
    require(bool(arrow), f"sharding string '{text}' has no '->'")
    sides = []
    for side, ranks in ((left, ranks_in), (right, ranks_out)):
        operands = side.split(",")
        require(len(operands) >= len(ranks), f"sharding string '{text}' has {len(operands)} operands for {len(ranks)}")
        sides.append(tuple(_operand(o, rank, text) for o, rank in zip(operands, ranks)))
    return Factors(sides[0], sides[1], frozenset(re.findall(r"(\w+)!", text)))


def _operand(text: str, rank: int, whole: str) -> Operand:
    words = re.findall(r"\([^)]*\)|[^\s()+]+", text.replace("!", ""))
    missing = rank - len([word for word in words if word != "..."])
    axes: list[Axis] = []
    for word in words:
        if word == "...":
            axes += [((f"...{position}",),) for position in range(missing)]
        else:
            axes.append(tuple(tuple(piece.split()) for piece in word.strip("()").split("|")))
    require(len(axes) == rank, f"operand '{text.strip()}' of sharding string '{whole}' does not have {rank} axes")
    return Operand(tuple(axes), added="+" in text)
