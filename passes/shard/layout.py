"""The form of a value on the ranks of a mesh axis: whole, divided along axes, or a summand of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deltaloom.graph.errors import GraphError
from deltaloom.graph.op import Array
from deltaloom.graph.types import TensorType
from deltaloom.passes.shard.cuts import Cut, Piece, local_size


@dataclass(frozen=True)
class Layout:
    """Which axes are divided, by number; or, if ``partial``, that the value is the sum over all ranks."""

    cuts: Mapping[int, Cut] = field(default_factory=dict)
    partial: bool = False

    @property
    def whole(self) -> bool:
        """Whether every rank has the value itself."""
        return not self.cuts and not self.partial

    def local(self, type_: TensorType) -> TensorType:
        """The type on one rank."""
        shape = (local_size(self.cuts[axis]) if axis in self.cuts else size for axis, size in enumerate(type_.shape))
        return TensorType(type_.dtype, tuple(shape))

    def text(self, mesh: str, ranks: int) -> str:
        """``tp: 2`` (axis 2 divided evenly), ``tp: partial``, ``tp: 1 (16/2|32/4)`` (sizes and parts of pieces), or nothing."""
        if self.partial:
            return f"{mesh}: partial"
        return ", ".join(f"{mesh}: {axis}{_pieces(cut, ranks)}" for axis, cut in sorted(self.cuts.items()))

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.cuts.items())), self.partial))

    def part(self, array: Array, rank: int, ranks: int) -> Array:
        """What ``rank`` has of a whole array; a partial layout has no one such part."""
        own = [_indices(self.cuts.get(axis, (Piece(size),)), rank, ranks) for axis, size in enumerate(array.shape)]
        found: Array = array[np.ix_(*own)] if self.cuts else array
        return found

    def assemble(self, arrays: Sequence[Array]) -> Array:
        """The whole array, from those of all ranks of the mesh axis in their order."""
        if self.whole:
            return arrays[0]
        if self.partial:
            return np.asarray(np.sum(arrays, axis=0))
        shape = list(arrays[0].shape)
        for axis, cut in self.cuts.items():
            shape[axis] = sum(piece.size for piece in cut)
        found = np.empty(shape, arrays[0].dtype)
        for rank, array in enumerate(arrays):
            own = [_indices(self.cuts.get(axis, (Piece(size),)), rank, len(arrays)) for axis, size in enumerate(shape)]
            found[np.ix_(*own)] = array
        return found


WHOLE = Layout()


def read_layout(text: str, type_: TensorType, ranks: int) -> Layout:
    """The layout that ``Layout.text`` wrote for a value that has ``type_`` on one rank. Raises ``GraphError``."""
    cuts: dict[int, Cut] = {}
    for part in filter(None, text.split(", ")):
        if re.fullmatch(r"\w+: partial", part):
            return Layout(partial=True)
        found = re.fullmatch(r"\w+: (\d+)(?: \(([^)]*)\))?", part)
        if found is None:
            raise GraphError(f"'{part}' is not how a value is divided; expected for example 'tp: 2' or 'tp: partial'")
        axis = int(found[1])
        if found[2] is None:
            size = type_.shape[axis]
            if not isinstance(size, int):
                raise GraphError(f"axis {axis} of {type_} has no known size, so it cannot be divided over ranks")
            cuts[axis] = (Piece(size * ranks, ranks),)
        else:
            numbers = [[int(n) for n in re.findall(r"\d+", piece)] for piece in found[2].split("|")]
            cuts[axis] = tuple(Piece(*n) for n in numbers)
    return Layout(cuts)


def _indices(cut: Cut, rank: int, ranks: int) -> Array:
    """Which elements of an axis are on ``rank``."""
    found, start = [], 0
    for piece in cut:
        first = start + piece.run(rank, ranks) * piece.local
        found.append(np.arange(first, first + piece.local))
        start += piece.size
    return np.concatenate(found)


def plain_axis(cut: Cut, ranks: int) -> bool:
    """Whether rank r of n simply has the r-th of n runs."""
    return cut == (Piece(cut[0].size, ranks),)


def _pieces(cut: Cut, ranks: int) -> str:
    if plain_axis(cut, ranks):
        return ""
    return f" ({'|'.join(f'{p.size}/{p.parts}' + (f' behind {p.outer}' if p.outer > 1 else '') for p in cut)})"
