"""Laws that an op can promise to obey. They are data here; the conformance kit checks them on generated cases.

Inputs are named as in ``infer``, outputs counted from 0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Streaming:
    """Running a sequence at once equals running it in two parts with the states of ``updates`` carried.

    ``sequence`` inputs are cut along axis 1, as are the outputs that are not states; ``prefix`` inputs are given to the
    first part up to where it ends and to the second part whole (axis 1 counts past positions too)."""

    sequence: tuple[str, ...]
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaddingIsNoOp:
    """Positions put before the sequence, zero (or False) in the ``zero`` inputs and anything in the other ``sequence``
    inputs, change neither the outputs of the later positions nor a state of fixed size. ``prefix`` inputs get theirs
    after the past. ``starts_zero``: the law holds only when the states start at zero."""

    sequence: tuple[str, ...]
    zero: tuple[str, ...]
    prefix: tuple[str, ...] = ()
    starts_zero: bool = False


@dataclass(frozen=True)
class ChunkInvariant:
    """``op.chunked(chunk, *arrays)`` equals the reference for every chunk size."""


@dataclass(frozen=True)
class PermutationEquivariant:
    """Permuting axis 0 (the batch) of the ``inputs`` permutes axis 0 of every output."""

    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Idempotent:
    """Applying the op to its own first output, other inputs unchanged, changes nothing."""


Law = Streaming | PaddingIsNoOp | ChunkInvariant | PermutationEquivariant | Idempotent
