"""Stages of a model's graph on its way through the passes, by name, each made when it is asked for.

``given``, the passes of the shared part (a second run is ``canonicalise.2``), ``shared``, the programs, and ``decode.assign`` for
the graph of a program after one of its own passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Graph
from deltaloom.passes.driver import AnyVariant, Driver
from deltaloom.passes.table import TABLE

GIVEN, SHARED = "given", "shared"
"""The graph before all passes, and after those that all programs share."""


class Stages:
    """The stages of what ``driver`` makes of ``given``. ``programs``: the programs by name."""

    def __init__(self, given: Graph, driver: Driver, programs: Mapping[str, AnyVariant]) -> None:
        self._given = given
        self._driver = driver
        self._programs = dict(programs)
        self._traced: dict[str, dict[str, Graph]] = {}

    def shared(self) -> tuple[str, ...]:
        """The stages before a program: given, then every pass of the shared part that has something to do."""
        return (GIVEN, *numbered(self._driver.pass_names()))

    def names(self) -> tuple[str, ...]:
        """All stages, in the order of the passes."""
        parts = [f"{program}.{name}" for program, variant in self._programs.items() for name in self._passes(variant)]
        return (*self.shared(), SHARED, *self._programs, *parts)

    def graph(self, stage: str) -> Graph:
        """The graph at a stage. ``CompileError`` for an unknown one names what is near, or all."""
        if stage == GIVEN:
            return self._given
        if stage == SHARED:
            return self._driver.shared.graph
        if stage in self._programs:
            return self._driver.program(self._programs[stage]).graph
        program, _, name = stage.partition(".")
        if program in self._programs and name in self._passes(self._programs[program]):
            return self._trace(program)[name]
        if stage in self.shared():
            return self._trace("")[stage]
        raise CompileError(f"there is no stage '{stage}' of graph '{self._given.name}'{self._hint(stage)}")

    def _passes(self, variant: AnyVariant | None) -> tuple[str, ...]:
        return numbered(self._driver.pass_names(variant))

    def _trace(self, program: str) -> dict[str, Graph]:
        """The graphs after the passes of a program, or ("") of the shared part."""
        if program not in self._traced:
            variant = self._programs[program] if program else None
            self._traced[program] = dict(zip(self._passes(variant), self._driver.trace(variant), strict=True))
        return self._traced[program]

    def _hint(self, stage: str) -> str:
        own = [name for name in self.names() if name.partition(".")[2] == stage]
        if own:
            return f": that pass belongs to a program; name one, as in {' or '.join(own[:2])}"
        if stage in TABLE:
            return f": that pass has nothing to do in this configuration; there is {', '.join(self.shared())}"
        if close := get_close_matches(stage, self.names(), n=3):
            return f"; did you mean {' or '.join(close)}?"
        programs = ", ".join(self._programs)
        return f"; there is {', '.join(self.shared())}, {SHARED}, {programs}, and PROGRAM.PASS such as decode.assign"


def numbered(names: Iterable[str]) -> tuple[str, ...]:
    """The names, a repeated one with its number: ``canonicalise.2``."""
    seen: Counter[str] = Counter()
    found: list[str] = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return tuple(found)
