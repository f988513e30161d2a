"""What a driver keeps in the compile cache: the shared graph with the decisions about layouts, and placed graphs of programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from deltaloom.graph.errors import CompileError, DeltaloomError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.passes.assign import LayoutKey
from deltaloom.passes.cache import CompileCache
from deltaloom.passes.cache_key import CacheKey
from deltaloom.passes.pipeline import Compiled, Event, LedgerRow
from deltaloom.passes.prepack import Conflict

T = TypeVar("T")
Texts = Mapping[str, str]
SHARED, PROGRAM = "shared", "program"
"""Kinds of entries."""


@dataclass(frozen=True)
class Decisions:
    """What holds for all programs of a model: layouts of weights, who lost them, and the fuel that is left for the programs."""

    layouts: Mapping[LayoutKey, tuple[int, ...]]
    conflicts: tuple[Conflict, ...]
    fuel: int | None
    ledger: tuple[LedgerRow, ...]


class Stored:
    """The entries of one driver. What cannot be read is reported and counts as absent."""

    def __init__(self, cache: CompileCache, key: CacheKey) -> None:
        self.cache = cache
        self.key = key
        self._texts: Texts | None = None

    def decisions(self) -> Decisions | None:
        """What the shared entry says, its graph excepted."""
        self._texts = self.cache.read(self.key, SHARED)
        found = self._decoded(self.key, SHARED, self._texts, _decisions)
        if found is None:
            self._texts = None
        return found

    def shared(self) -> Compiled | None:
        """The shared graph, of which ``decisions`` were read before; it is read when it is needed only."""
        return self._decoded(self.key, SHARED, self._texts, _compiled)

    def keep_shared(self, compiled: Compiled, decisions: Decisions) -> None:
        """Write the shared entry."""
        facts = {
            "layouts": [[list(key), axes] for key, axes in decisions.layouts.items()],
            "conflicts": [asdict(conflict) for conflict in decisions.conflicts],
            "fuel": decisions.fuel,
        }
        self.cache.write(self.key, SHARED, {"facts": json.dumps(facts), **_texts(compiled)})

    def program(self, title: str, outputs: Sequence[str]) -> Compiled | None:
        """The placed graph of a program."""
        key = self.key.extended(program=title)

        def decode(texts: Texts) -> Compiled:
            found = _compiled(texts)
            names = tuple(name for name, _ in found.graph.outputs)
            require(names == tuple(outputs), f"its graph gives {names}, not {tuple(outputs)}", CompileError)
            return found

        return self._decoded(key, PROGRAM, self.cache.read(key, PROGRAM), decode)

    def keep_program(self, title: str, compiled: Compiled) -> None:
        """Write the entry of a program."""
        self.cache.write(self.key.extended(program=title), PROGRAM, _texts(compiled))

    def reject_program(self, title: str, reason: object) -> None:
        """Say that the program of an entry cannot be used after all."""
        self.cache.reject(self.key.extended(program=title), PROGRAM, reason)

    def _decoded(self, key: CacheKey, kind: str, texts: Texts | None, decode: Callable[[Texts], T]) -> T | None:
        if texts is None:
            return None
        try:
            return decode(texts)
        except (DeltaloomError, ValueError, TypeError, LookupError) as error:
            self.cache.reject(key, kind, error)
            return None


def _texts(compiled: Compiled) -> Texts:
    return {
        "graph": to_json(compiled.graph),
        "regions": json.dumps(list(compiled.graph.regions)),
        "properties": json.dumps(sorted(compiled.properties)),
        "ledger": json.dumps([asdict(row) for row in compiled.ledger]),
    }


def _compiled(texts: Texts) -> Compiled:
    graph: Graph = from_json(texts["graph"])
    ordered = {name: graph.region(name) for name in json.loads(texts["regions"])}  # canonical JSON sorts them by name
    require(len(ordered) == len(graph.regions), "its list of regions is not complete", CompileError)
    return Compiled(replace(graph, regions=ordered), frozenset(json.loads(texts["properties"])), _ledger(texts))


def _ledger(texts: Texts) -> tuple[LedgerRow, ...]:
    rows: list[dict[str, Any]] = json.loads(texts["ledger"])
    return tuple(LedgerRow(**{**row, "events": tuple(Event(**event) for event in row["events"])}) for row in rows)


def _decisions(texts: Texts) -> Decisions:
    facts: dict[str, Any] = json.loads(texts["facts"])
    layouts = {(str(a), str(b), str(c)): tuple(axes) for (a, b, c), axes in facts["layouts"]}
    conflicts = tuple(
        Conflict(_key(one["weight"]), tuple(one["kept"]), tuple(one["lost"]), one["loser"]) for one in facts["conflicts"]
    )
    return Decisions(layouts, conflicts, facts["fuel"], _ledger(texts))


def _key(names: Sequence[str]) -> LayoutKey:
    graph, weight, backend = names
    return graph, weight, backend
