"""What a person says about a partition: a mesh, and which parameters are divided along which factor. The rest follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltaloom.graph.errors import ConfigError, require

MESH_AXES = ("tp", "ep", "pp", "dp")
"""Tensor, expert, pipeline and data parallel."""

Mesh = Mapping[str, int]
"""Ranks along each mesh axis: ``{"tp": 4}``."""


@dataclass(frozen=True)
class Divide:
    """One line of a plan: the ops that read a parameter whose name (relative to its region) matches ``params``, with ``*`` for
    any text, divide the factor ``factor`` of their sharding string over ``mesh``. ``needed=False``: where the size allows it."""

    params: str
    factor: str
    mesh: str = "tp"
    needed: bool = True


Plan = tuple[Divide, ...]


def check_mesh(mesh: Mesh) -> dict[str, int]:
    """The axes of ``mesh`` with more than one rank; ``ConfigError`` for unknown axes and counts below 1."""
    for axis, ranks in mesh.items():
        require(axis in MESH_AXES, f"mesh has an axis '{axis}'; known are {', '.join(MESH_AXES)}", ConfigError)
        counted = type(ranks) is int and ranks >= 1
        require(counted, f"mesh axis {axis} has {ranks!r} ranks, expected a whole number of at least 1", ConfigError)
    return {axis: ranks for axis, ranks in mesh.items() if ranks > 1}
