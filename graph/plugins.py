"""The plugins of this process: which there are, what became of them, and who offers a name.

The metadata of installed distributions are read once, when they are first asked for. A plugin is imported when something of it, or
something unknown, is asked for, and at compile, for its kernels and rules. One that cannot be used is recorded: an error for
whoever asked for it, a warning otherwise, and with ``DELTALOOM_PLUGINS_STRICT=1`` always an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module

from deltaloom.graph.errors import ConfigError, DeltaloomError, PluginError, require
from deltaloom.graph.plugin import API, GROUP, KINDS, WORDS, Kind, Plugin
from deltaloom.graph.plugin_discovery import Record, installed, strict

__all__ = [
    "API", "BUILT_IN", "GROUP", "KINDS", "REPLACEABLE", "Check", "Kind", "Offer", "Plugin", "PluginWarning", "Record", "attempt",
    "check_use", "complain", "find", "imported", "load", "load_all", "offer", "offers", "offers_of_loaded", "record", "records",
    "register", "registered", "rescan", "shortfall",
]  # fmt: skip

BUILT_IN = "deltaloom"
"""The name under which a configuration chooses what is built in."""
REPLACEABLE: tuple[Kind, ...] = ("backends", "kernels", "models")
"""Kinds of which a configuration may say whose is used, by ``use``: those whose names are not dotted."""

Check = Callable[[object], str]
"""Says of an offered object what is wrong with it; nothing if it is as it has to be."""


class PluginWarning(UserWarning):
    """A plugin, or something that it offers, which nobody asked for by name and which cannot be used."""


@dataclass
class _Process:
    """The state of this process: what was registered in it, what is installed (None: not looked yet), and loaded objects."""

    registered: list[Record] = field(default_factory=list)
    installed: list[Record] | None = None
    objects: dict[tuple[str, Kind, str], object] = field(default_factory=dict)


_process = _Process()


@dataclass(frozen=True)
class Offer:
    """One thing that a plugin offers."""

    record: Record
    plugin: Plugin
    kind: Kind
    name: str

    @property
    def target(self) -> object:
        """The path of it, or the object."""
        return self.plugin.offers(self.kind)[self.name]

    def __str__(self) -> str:
        return f"the {WORDS[self.kind]} '{self.name}' of {self.record.title}"

    def load(self, check: Check) -> object:
        """The object itself, imported if need be. ``PluginError`` where that fails, the original exception as its cause, and where
        ``check`` finds something wrong."""
        key = (self.plugin.name, self.kind, self.name)
        if key in _process.objects:
            return _process.objects[key]
        target = self.target
        found, wrong, cause = imported(target) if isinstance(target, str) else (target, "", None)
        place = f" at '{target}'" if isinstance(target, str) else ""
        wrong = wrong or check(found)
        if wrong:
            self.record.problems[self.kind, self.name] = wrong
            raise PluginError(f"{self}{place} cannot be used: {wrong}") from cause
        _process.objects[key] = found
        return found


def register(plugin: Plugin) -> None:
    """Let a plugin take part in this process without being installed. ``PluginError`` for a name that is taken and for an API that
    does not fit."""
    require(isinstance(plugin, Plugin), f"register() is given {type(plugin).__name__}, expected a deltaloom.Plugin", PluginError)
    for other in records():
        taken = f"a plugin '{plugin.name}' cannot be registered: the name is taken by {other.origin}"
        require(other.name != plugin.name, taken, PluginError)
    misfit = plugin.misfit() or _taken(plugin)
    require(not misfit, f"the plugin '{plugin.name}' cannot be registered: {misfit}", PluginError)
    _process.registered.append(Record(plugin.name, "loaded", plugin=plugin))


@contextmanager
def registered(*plugins: Plugin) -> Iterator[None]:
    """Have plugins registered while the block runs."""
    before = list(_process.registered)
    try:
        for plugin in plugins:
            register(plugin)
        yield
    finally:
        _process.registered[:] = before
        names = {plugin.name for plugin in plugins}
        _process.objects = {key: found for key, found in _process.objects.items() if key[0] not in names}


def rescan() -> None:
    """Forget what is installed, so that it is looked for again, with the environment variables as they are now."""
    kept = {record.name for record in _process.registered}
    _process.objects = {key: found for key, found in _process.objects.items() if key[0] in kept}
    _process.installed = None


def records() -> list[Record]:
    """Every plugin, by name, with its state. Reads metadata once; imports nothing."""
    if _process.installed is None:
        _process.installed = installed()
    return sorted([*_process.registered, *_process.installed], key=lambda record: record.name)


def record(name: str) -> Record:
    """What is known of the plugin ``name``. ``PluginError`` if there is none; nothing is imported."""
    known = {record.name: record for record in reversed(records())}
    if name not in known:
        close = get_close_matches(name, known, 1)
        has = f"there are {', '.join(sorted(known))}" if known else "none is installed"
        hint = f"did you mean '{close[0]}'?" if close else has
        raise PluginError(f"there is no plugin '{name}'; {hint}")
    return known[name]


def load(name: str) -> Plugin:
    """The plugin ``name``, imported if need be. ``PluginError`` if there is none, or it is broken or blocked."""
    found = record(name)
    attempt(found)
    if found.plugin is None or found.state in ("failed", "blocked"):
        raise found.error()
    return found.plugin


def load_all() -> None:
    """Import every plugin that is not blocked. One that cannot be used is warned of, once; with ``DELTALOOM_PLUGINS_STRICT=1``
    it is a ``PluginError``."""
    for one in records():
        attempt(one)
        if one.state == "failed":
            complain(one, one.error())


def complain(about: Record, error: PluginError) -> None:
    """Warn of what nobody asked for by name, once; raise it if ``DELTALOOM_PLUGINS_STRICT`` says so."""
    if strict():
        raise error
    text = str(error)
    if text not in about.warned:
        about.warned.add(text)
        warnings.warn(PluginWarning(text), stacklevel=3)


def offers(kind: Kind) -> list[Offer]:
    """Everything that plugins offer of a kind, by plugin and name; imports the plugins, and nothing that their paths name."""
    load_all()
    return offers_of_loaded(kind)


def offers_of_loaded(kind: Kind) -> list[Offer]:
    """The same of the plugins that are loaded; imports nothing."""
    loaded = [(one, one.plugin) for one in records() if one.plugin is not None and one.state == "loaded"]
    return [Offer(one, plugin, kind, name) for one, plugin in loaded for name in sorted(plugin.offers(kind))]


def offer(plugin: str, kind: Kind, name: str) -> Offer:
    """What ``plugin`` offers under a name. ``PluginError`` if there is no such plugin, or it does not offer that."""
    owner = load(plugin)
    if name not in owner.offers(kind):
        has = ", ".join(owner.offers(kind)) or "none"
        raise PluginError(f"the {record(plugin).title} offers no {WORDS[kind]} '{name}'; of that kind it offers {has}")
    return Offer(record(plugin), owner, kind, name)


def find(kind: Kind, name: str, *, built_in: bool, use: Mapping[str, str] | None = None) -> Offer | None:
    """Who offers a plain name: None for what is built in, and where nobody does. ``use``: see ``check_use``. ``PluginError`` names
    both where two plugins do."""
    wanted = (use or {}).get(f"{kind}.{name}")
    if wanted is not None and wanted != BUILT_IN:
        return offer(wanted, kind, name)
    if built_in or wanted == BUILT_IN:
        return None
    found = [one for one in offers(kind) if one.name == name]
    if len(found) > 1:
        owners = " and ".join(one.record.title for one in found)
        hint = f'say whose is used with use = {{ "{kind}.{name}" = "{found[0].plugin.name}" }}, or uninstall one'
        raise PluginError(f"the {WORDS[kind]} '{name}' is offered by the {owners}; {hint}")
    return found[0] if found else None


def shortfall() -> str:
    """What to add where a name is unknown: the plugins that cannot be used and might have it; nothing if there are none."""
    failed = [one for one in records() if one.state in ("failed", "blocked")]
    return "".join(
        f"\n  the {one.title} {one.state == 'failed' and 'cannot be used' or 'is blocked'}: {one.reason}" for one in failed
    )


def check_use(use: Mapping[str, str]) -> None:
    """Refuse a choice that cannot work: ``use`` is ``kind.name`` -> the plugin whose backend, kernels or model type is used, or
    ``deltaloom``. ``ConfigError``, or ``PluginError`` for a plugin that does not offer that."""
    for key, owner in use.items():
        kind, _, name = key.partition(".")
        kinds = " or ".join(f"{one}.NAME" for one in REPLACEABLE)
        require(kind in REPLACEABLE and bool(name), f"use has the key '{key}', expected {kinds}", ConfigError)
        require(isinstance(owner, str), f"use.{key} is {owner!r}, expected the name of a plugin", ConfigError)
        if owner != BUILT_IN:
            offer(owner, next(one for one in REPLACEABLE if one == kind), name)


def attempt(found: Record) -> None:
    """Import a plugin that is not loaded yet and look at what it is; the record says what came of it."""
    if found.state != "found" or found.entry is None:
        return
    try:
        target: object = found.entry.load()
    except (Exception, SystemExit) as error:
        found.fail(f"its target '{found.target}' cannot be imported: {_said(error)}", error)
        return
    if not isinstance(target, Plugin):
        found.fail(f"its target '{found.target}' is {type(target).__name__}, expected a deltaloom.Plugin")
    elif target.name != found.name:
        found.fail(f"its entry point is called '{found.name}' and its Plugin '{target.name}'; give both one name")
    elif misfit := target.misfit() or _taken(target):
        found.fail(misfit)
    else:
        found.plugin, found.state = target, "loaded"


def _taken(plugin: Plugin) -> str:
    """Why ``g.NAME`` of a graph builder cannot stand for the plugin's ops: it is something else."""
    from deltaloom.graph.builder import GraphBuilder  # which imports this file, through the registry of ops
    from deltaloom.graph.registry import ops

    name = plugin.name
    if not plugin.ops or not (hasattr(GraphBuilder, name) or name in ("name", "dtype") or name in ops):
        return ""
    return f"it offers ops, and g.{name} of a graph builder is something else; give it another name"


def imported(path: str) -> tuple[object, str, BaseException | None]:
    """What ``module:attribute`` names, or what went wrong and the exception."""
    module, _, attribute = path.partition(":")
    try:
        found: object = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        return None, _said(error), error
    return found, "", None


def _said(error: BaseException) -> str:
    """An exception in one line; a sentence of ours as it is."""
    text = " ".join(str(error).split())
    if isinstance(error, DeltaloomError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
