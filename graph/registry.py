"""Registries: names to classes, imported when first asked for, open to plugins."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from deltaloom.graph import plugins
from deltaloom.graph.errors import GraphError, PluginError
from deltaloom.graph.op import Op
from deltaloom.graph.plugin import Kind

N = TypeVar("N")
T = TypeVar("T")


class Prefix(Generic[T]):
    """``g.mylab``: its attributes are what the names that begin with ``mylab.`` stand for."""

    def __init__(self, prefix: str, find: Callable[[str], T]) -> None:
        self._prefix = prefix
        self._find = find

    def __getattr__(self, name: str) -> T:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._find(f"{self._prefix}.{name}")


class Registry(Generic[N]):
    """Classes of one ``kind`` by name. Built-ins come as a table of ``name -> "module:Class"`` that is imported lazily. With
    ``offers``, dotted names are those of plugins, which offer subclasses of ``base`` under that heading."""

    def __init__(self, kind: str, base: type[N], offers: Kind | None = None) -> None:
        self._kind = kind
        self._base = base
        self._offers = offers
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
        """The class called ``name``. ``GraphError`` names close matches when there is none, ``PluginError`` says why the plugin
        that a dotted name begins with cannot give it."""
        if name not in self._classes:
            if name not in self._paths:
                if self._offers is not None and "." in name:
                    return self._of_plugin(name, self._offers)
                close = get_close_matches(name, self._paths, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(sorted(self._paths))}"
                raise GraphError(f"there is no {self._kind} '{name}'{hint}")
            module, _, attribute = self._paths[name].partition(":")
            self._classes[name] = getattr(importlib.import_module(module), attribute)
        return self._classes[name]

    def offered(self) -> Iterator[type[N]]:
        """The classes of plugins, by plugin and name. One that cannot be imported is warned of and left out."""
        for offer in plugins.offers(self._offers) if self._offers is not None else ():
            try:
                yield self._loaded(offer)
            except PluginError as error:
                plugins.complain(offer.record, error)

    def built_in(self) -> Iterator[type[N]]:
        """The classes that no plugin offers, by name."""
        return (self.get(name) for name in sorted(self._paths))

    def __contains__(self, name: object) -> bool:
        if name in self._paths or self._offers is None or not isinstance(name, str) or "." not in name:
            return name in self._paths
        owner = name.partition(".")[0]
        return any(one.name == owner for one in plugins.records()) and name in plugins.load(owner).offers(self._offers)

    def __iter__(self) -> Iterator[type[N]]:
        yield from self.built_in()
        yield from self.offered()

    def attribute(self, name: str, make: Callable[[type[N]], T]) -> T | Prefix[T]:
        """What an attribute called ``name`` stands for where attributes are names of this registry: what ``make`` makes of the
        class, or, for the name of a plugin, a ``Prefix``. ``AttributeError`` for private names."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self and self._is_prefix(name):
            return Prefix(name, lambda full: make(self.get(full)))
        return make(self.get(name))

    def _is_prefix(self, name: str) -> bool:
        known = any(one.startswith(f"{name}.") for one in self._paths)
        return known or self._offers is not None and any(one.name == name for one in plugins.records())

    def _of_plugin(self, name: str, kind: Kind) -> type[N]:
        try:
            return self._loaded(plugins.offer(name.partition(".")[0], kind, name))
        except PluginError as error:
            error.add_note(f"  asked for as the {self._kind} '{name}'")
            raise

    def _loaded(self, offer: plugins.Offer) -> type[N]:
        found = offer.load(lambda found: self._wrong(found, offer.name))
        assert isinstance(found, type) and issubclass(found, self._base)
        return found

    def _wrong(self, found: object, name: str) -> str:
        if not isinstance(found, type) or not issubclass(found, self._base):
            return f"it is {found!r}, expected a subclass of {self._base.__module__}.{self._base.__name__}"
        own = str(getattr(found, "name", ""))
        return "" if own == name else f"the class calls itself '{own}'; its name has to be '{name}'"

    def _refuse_clash(self, name: str, path: str) -> None:
        if self._paths.get(name, path) != path:
            raise GraphError(f"the {self._kind} name '{name}' is taken by {self._paths[name]}; {path} cannot have it too")


class OpRegistry(Registry[Op]):
    """Ops by name."""

    def __init__(self) -> None:
        super().__init__("op", Op, "ops")


ops = OpRegistry()
"""The registry of this process; ``deltaloom.ops`` puts the built-in table into it when it is imported."""
