"""The op registry: names to classes, imported when first asked for, open to plugins."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from deltaloom.graph.errors import GraphError
from deltaloom.graph.op import Op


class OpRegistry:
    """Ops by name. Built-ins come as a table of ``name -> "module:Class"`` that is imported lazily, plugins as classes."""

    def __init__(self) -> None:
        self._paths: dict[str, str] = {}
        self._classes: dict[str, type[Op]] = {}

    def add_table(self, table: Mapping[str, str]) -> None:
        """Register built-ins by dotted path; nothing is imported."""
        for name, path in table.items():
            self._refuse_clash(name, path)
            self._paths[name] = path

    def add(self, op: type[Op]) -> type[Op]:
        """Register a class; usable as a decorator. A second op of the same name is an error that names both."""
        self._refuse_clash(op.name, f"{op.__module__}:{op.__qualname__}")
        self._paths[op.name] = f"{op.__module__}:{op.__qualname__}"
        self._classes[op.name] = op
        return op

    def remove(self, name: str) -> None:
        """Forget an op (for tests that register one)."""
        self._paths.pop(name)
        self._classes.pop(name, None)

    def get(self, name: str) -> type[Op]:
        """The class of the op ``name``; ``GraphError`` names close matches when there is none."""
        if name not in self._classes:
            if name not in self._paths:
                close = get_close_matches(name, self._paths, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(sorted(self._paths))}"
                raise GraphError(f"there is no op '{name}'{hint}")
            module, _, attribute = self._paths[name].partition(":")
            self._classes[name] = getattr(importlib.import_module(module), attribute)
        return self._classes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[type[Op]]:
        return (self.get(name) for name in sorted(self._paths))

    def _refuse_clash(self, name: str, path: str) -> None:
        if self._paths.get(name, path) != path:
            raise GraphError(f"the op name '{name}' is taken by {self._paths[name]}; {path} cannot have it too")


ops = OpRegistry()
"""The registry of this process; ``deltaloom.ops`` puts the built-in table into it when it is imported."""
