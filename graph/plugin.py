"""What a plugin is: a ``Plugin``, plain data that says under which names it offers what, and where that is.

A distribution offers one by an entry point of the group ``deltaloom.plugins``, whose name is the plugin's::

    [project.entry-points."deltaloom.plugins"]
    mylab = "mylab_plugin:plugin"

Nothing is imported before it is needed: not the plugin, and not what its paths name. A plugin is code with the user's rights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword
from types import MappingProxyType
from typing import Literal, get_args

from deltaloom.graph.errors import PluginError, require

API = (1, 0)
"""The plugin API of this deltaloom: a plugin's major number must be the same, its minor number may be older."""
GROUP = "deltaloom.plugins"
"""The group of entry points."""

Kind = Literal["ops", "kernels", "rules", "passes", "models", "backends"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DOTTED: tuple[Kind, ...] = ("ops", "rules", "passes")
"""Kinds whose names begin with the plugin's name and a dot, so that plugins cannot clash in them."""
WORDS: Mapping[Kind, str] = {
    "ops": "op",
    "kernels": "kernels for the backend",
    "rules": "rewrite rule",
    "passes": "pass",
    "models": "model type",
    "backends": "backend",
}
"""What an offer of a kind is called in sentences."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

Offers = Mapping[str, object]
"""Name -> ``"module:attribute"``, imported when it is first needed, or the object itself."""


@dataclass(frozen=True, eq=False)
class Plugin:
    """What one plugin offers, under the API version that it was written for.

    ``ops``: name -> a subclass of ``Op``, in graphs ``g.mylab.relu2(x)``. ``kernels``: name of a backend -> a ``KernelTable`` with
    more kernels for it. ``rules``: name -> a rewrite rule for the pass ``fuse``. ``passes``: name -> a ``Pass`` for pipelines.
    ``models``: model_type -> a ``Family``. ``backends``: name -> a class that is called with ``device`` and ``threads``.
    Names of ops, rules and passes begin with the plugin's name and a dot; backends and model types are plain identifiers.

    ``claims``: features that the conformance kit holds it to (``deltaloom.testing.requirements``); None: what it is found to have.
    Raises ``PluginError`` for fields that cannot be meant."""

    name: str
    api: tuple[int, int] = API
    description: str = ""
    url: str = ""
    ops: Offers = field(default_factory=dict)
    kernels: Offers = field(default_factory=dict)
    rules: Offers = field(default_factory=dict)
    passes: Offers = field(default_factory=dict)
    models: Offers = field(default_factory=dict)
    backends: Offers = field(default_factory=dict)
    claims: Collection[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or iskeyword(self.name) or self.name == "deltaloom":
            wanted = "expected lower-case letters, digits and _, a letter first, as in mylab"
            raise PluginError(f"the name of a plugin is {self.name!r}; {wanted}")
        numbers = isinstance(self.api, tuple) and len(self.api) == 2 and all(type(number) is int for number in self.api)
        require(numbers, f"api of plugin {self.name} is {self.api!r}, expected two numbers, as in {API}", PluginError)
        for key in ("description", "url"):
            text: object = getattr(self, key)
            require(isinstance(text, str), f"{key} of plugin {self.name} is {text!r}, expected a text", PluginError)
        plain = self.claims is None or not isinstance(self.claims, str) and all(isinstance(claim, str) for claim in self.claims)
        require(plain, f"claims of plugin {self.name} is {self.claims!r}, expected names of features", PluginError)
        for kind in KINDS:
            offers: object = getattr(self, kind)
            if not isinstance(offers, Mapping):
                raise PluginError(f"{kind} of plugin {self.name} is {type(offers).__name__}, expected a table of names")
            for name, target in offers.items():
                self._check(kind, name, target)
            object.__setattr__(self, kind, MappingProxyType(dict(offers)))

    def _check(self, kind: Kind, name: object, target: object) -> None:
        """Refuse an offer whose name or path cannot be meant."""
        said = f"{kind} of plugin {self.name}"
        if kind in DOTTED:
            start = f"{self.name}."
            dotted = isinstance(name, str) and name.startswith(start) and name.removeprefix(start).isidentifier()
            require(dotted, f"{said} has the name {name!r}; it must begin with the plugin's name, as in '{start}name'", PluginError)
        else:
            plain = isinstance(name, str) and name.isidentifier()
            require(plain, f"{said} has the name {name!r}, expected a plain identifier", PluginError)
        if isinstance(target, str):
            shown = f"the {WORDS[kind]} '{name}' of plugin {self.name} is at {target!r}"
            require(bool(_PATH.fullmatch(target)), f"{shown}, expected 'module:attribute'", PluginError)
        require(target is not None, f"the {WORDS[kind]} '{name}' of plugin {self.name} is None", PluginError)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of which it offers something."""
        return tuple(kind for kind in KINDS if self.offers(kind))

    def offers(self, kind: Kind) -> Offers:
        """What it offers of a kind."""
        found: Offers = getattr(self, kind)
        return found

    def misfit(self) -> str:
        """Why this deltaloom cannot work with it, because of the API that it was written for; nothing if it can."""
        needs, has = (".".join(map(str, version)) for version in (self.api, API))
        if self.api[0] == API[0] and self.api[1] <= API[1]:
            return ""
        newer = self.api > API
        hint = "upgrade deltaloom" if newer else "install a newer version of the plugin"
        return f"it needs plugin API {needs}, and this deltaloom has {has}; {hint}"
