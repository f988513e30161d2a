"""The factor notation of ``Op.sharding``: which axes of inputs and outputs are one and the same factor.

``"... i, o i, +o -> ... o"`` (linear): operands are separated by commas, inputs and outputs by ``->``, axes by spaces.
A factor that occurs in several operands is cut in all of them; an output without it is then the same on every rank. One
that no output has is summed over: every rank gives a partial sum; a ``+`` operand is added to the result, so that one
rank alone may give it. ``f!`` must stay whole.
``(h r)`` is one axis made of factors, the first one the slowest; a number is a factor of that size and stays whole.
``...`` stands for any number of axes. An axis of size 1 is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from deltaloom.graph.errors import GraphError, require

Axis = tuple[str, ...]
"""The factors of one axis, the slowest first."""


@dataclass(frozen=True)
class Operand:
    """One input or output: its axes, and whether it is added to the result (``+``)."""

    axes: tuple[Axis, ...]
    added: bool = False

    def find(self, factor: str) -> tuple[int, int] | None:
        """Where ``factor`` is: (axis, position within the axis)."""
        for axis, factors in enumerate(self.axes):
            if factor in factors:
                return axis, factors.index(factor)
        return None


@dataclass(frozen=True)
class Factors:
    """A parsed sharding string."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    whole: frozenset[str]

    @property
    def cuttable(self) -> tuple[str, ...]:
        """The factors that may be divided over ranks, in the order of their first use."""
        found = [f for operand in self.inputs for axis in operand.axes for f in axis]
        return tuple(f for f in dict.fromkeys(found) if f not in self.whole and not f.isdigit())

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The size of every factor, from the shapes of the inputs given."""
        axes = [
            (factors, size)
            for operand, shape in zip(self.inputs, shapes)
            for factors, size in zip(operand.axes, shape, strict=True)
        ]
        sizes = {f: int(f) for factors, _ in axes for f in factors if f.isdigit()}
        for factors, size in sorted(axes, key=lambda axis: len(axis[0])):
            unknown = [f for f in factors if f not in sizes]
            if len(factors) == 1:
                sizes[factors[0]] = max(size, sizes.get(factors[0], 1))
            elif len(unknown) == 1:
                sizes[unknown[0]] = size // prod(sizes[f] for f in factors if f in sizes)
            elif unknown:
                raise GraphError(f"the factors {' and '.join(unknown)} of one axis have no size of their own elsewhere")
        return sizes


def parse_factors(text: str, ranks_in: Sequence[int], ranks_out: Sequence[int]) -> Factors:
    """Read a sharding string for inputs and outputs of the given ranks; absent optional inputs are left out.
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
            axes += [(f"...{position}",) for position in range(missing)]
        else:
            axes.append(tuple(word.strip("()").split()))
    require(len(axes) == rank, f"operand '{text.strip()}' of sharding string '{whole}' does not have {rank} axes")
    return Operand(tuple(axes), added="+" in text)
