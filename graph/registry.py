"""Registries: names to classes, imported when first asked for, open to plugins."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from deltaloom.graph.errors import GraphError
from deltaloom.graph.op import Op

N = TypeVar("N")


class Registry(Generic[N]):
    """Classes of one ``kind`` by name. Built-ins come as a table of ``name -> "module:Class"`` that is imported lazily, plugins as
    classes."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._paths: dict[str, str] = {}
        self._classes: dict[str, type[N]] = {}

    def add_table(self, table: Mapping[str, str]) -> None:
        """Register built-ins by dotted path; nothing is imported."""
        for name, path in table.items():
            self._refuse_clash(name, path)
            self._paths[name] = path

    def add(self, item: type[N]) -> type[N]:
        """Register a class under its ``name``; usable as a decorator. A second one of that name is an error that names both."""
        name, path = str(item.name), f"{item.__module__}:{item.__qualname__}"  # type: ignore[attr-defined]
        self._refuse_clash(name, path)
        self._paths[name] = path
        self._classes[name] = item
        return item

    def remove(self, name: str) -> None:
        """Forget a class (for tests that register one)."""
        self._paths.pop(name)
        self._classes.pop(name, None)

    def get(self, name: str) -> type[N]:
        """The class called ``name``; ``GraphError`` names close matches when there is none."""
        if name not in self._classes:
            if name not in self._paths:
                close = get_close_matches(name, self._paths, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(sorted(self._paths))}"
                raise GraphError(f"there is no {self._kind} '{name}'{hint}")
            module, _, attribute = self._paths[name].partition(":")
            self._classes[name] = getattr(importlib.import_module(module), attribute)
        return self._classes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[type[N]]:
        return (self.get(name) for name in sorted(self._paths))

    def _refuse_clash(self, name: str, path: str) -> None:
        if self._paths.get(name, path) != path:
            raise GraphError(f"the {self._kind} name '{name}' is taken by {self._paths[name]}; {path} cannot have it too")


class OpRegistry(Registry[Op]):
    """Ops by name."""

    def __init__(self) -> None:
        super().__init__("op")


ops = OpRegistry()
"""The registry of this process; ``deltaloom.ops`` puts the built-in table into it when it is imported."""
