"""The key of a compiled graph: everything that decides about the result, by component, so that a miss can be explained."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from sys import modules

from deltaloom import __version__
from deltaloom.graph.ir import FORMAT_VERSION, Graph
from deltaloom.graph.plugin_discovery import Record
from deltaloom.graph.plugins import KINDS, Plugin, load_all, records
from deltaloom.graph.registry import ops
from deltaloom.graph.serialize import to_json
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.kernel import Backend, Kernel, added_kernels
from deltaloom.passes.pipeline import Context
from deltaloom.passes.table import step_name

CODE = ("graph", "ops", "passes", "backends")
"""Folders of deltaloom whose sources decide what a graph is compiled to."""
WITHOUT_EFFECT = ("cache", "dump", "prefill_chunk")
"""Fields of the configuration on which compiled graphs do not depend."""


@dataclass(frozen=True)
class CacheKey:
    """Component -> a digest or value of it."""

    components: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all components, in hexadecimal."""
        return _digest(json.dumps(dict(self.components), sort_keys=True))

    def extended(self, **components: str) -> CacheKey:
        """The key with more components."""
        return CacheKey({**self.components, **components})

    def changed(self, other: Mapping[str, str]) -> list[str]:
        """The components in which an entry with ``other`` differs, by name, each with both values."""
        names = sorted({*self.components, *other})
        shown = {name: (_short(other.get(name)), _short(self.components.get(name))) for name in names}
        return [f"{name}: {then} -> {now}" for name, (then, now) in shown.items() if other.get(name) != self.components.get(name)]


def cache_key(graph: Graph, ctx: Context, **more: object) -> CacheKey:
    """The key of what ``graph`` is compiled to; ``more``: further facts of which it depends, by component."""
    config = ctx.config
    components = {
        "graph": _digest(to_json(graph)),
        "graph format": str(FORMAT_VERSION),
        "ops": _digest(json.dumps(sorted((op.name, op.version, _source(op.__module__)) for op in ops.built_in()))),
        "deltaloom": f"{__version__} {_code()}",
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()} {platform.node()}",
        **{f"package {name}": _package(name) for name in ("numpy", "torch", "triton")},
        **{f"kernels of {backend.name} on {backend.device}": _kernels(backend) for backend in ctx.backends},
        **{f"plugin {one.name}": _plugin(one, plugin) for one, plugin in _taking_part(graph, ctx)},
        **{f"compile.{field.name}": _setting(config, field.name) for field in fields(config) if field.name not in WITHOUT_EFFECT},
        **{name: _digest(repr(value)) for name, value in more.items()},
    }
    return CacheKey(components)


def nearest(key: CacheKey, entries: Iterable[tuple[str, Mapping[str, str]]]) -> tuple[str, list[str]] | None:
    """Of named entries the one that differs from ``key`` in fewest components, and what differs; None if there is none."""
    found = [(key.changed(components), name) for name, components in entries]
    if not found:
        return None
    changed, name = min(found, key=lambda pair: (len(pair[0]), pair[1]))
    return name, changed


def _setting(config: CompileConfig, name: str) -> str:
    value = getattr(config, name)
    return json.dumps(value, default=repr)


def _kernels(backend: Backend) -> str:
    """Every kernel of a backend with what decides whether it gets a node, and the sources of what plugins bring."""
    found = [_kernel(kernel) for kernel in (*backend.kernels(), *added_kernels(backend.name))]
    return _digest(json.dumps([_source(type(backend).__module__), *found]))


def _kernel(kernel: Kernel) -> list[object]:
    code = [(_module(f), getattr(f, "__qualname__", ""), _source(_module(f))) for f in (kernel.run, *kernel.when)]
    return [kernel.op, kernel.name, sorted(kernel.wants.items()), code]


def _taking_part(graph: Graph, ctx: Context) -> Iterator[tuple[Record, Plugin]]:
    """The plugins whose offers may have to do with the result: rules are tried on every graph, kernels where their backend is used,
    and what rewrites bring in is of a plugin with rules or passes. What else a plugin offers is named by graph or configuration."""
    load_all()
    steps = {step_name(step) for part in ctx.config.steps for step in part}
    backends = {backend.name for backend in ctx.backends}
    used = {node.op.name for body in (graph, *graph.regions.values()) for node in body.nodes}
    models = {graph.name.removesuffix("_mtp")}
    for one in records():
        if one.plugin is None or one.state != "loaded":
            continue
        offered = (steps & {*one.plugin.passes}, used & {*one.plugin.ops}, models & {*one.plugin.models})
        if one.plugin.rules or backends & {*one.plugin.kernels, *one.plugin.backends} or any(offered):
            yield one, one.plugin


def _plugin(one: Record, plugin: Plugin) -> str:
    """Distribution and version of a plugin, and a digest of its offers and sources, which change under one version while it is
    written."""
    offers = [(kind, name, _place(target)) for kind in KINDS for name, target in sorted(plugin.offers(kind).items())]
    files = sorted({path for module in sorted({place.partition(":")[0] for *_, place in offers}) for path in _sources(module)})
    total = sha256(json.dumps(offers).encode())
    for path in files:
        total.update(f"{path.name}\0".encode() + _content(path))
    return f"{one.origin} {total.hexdigest()}"


def _place(target: object) -> str:
    return target if isinstance(target, str) else f"{_module(target)}:{getattr(target, '__qualname__', '')}"


def _sources(module: str) -> list[Path]:
    """The Python files beside a module of a plugin's package, or the module's own file; nothing of that is imported."""
    try:
        spec = find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return []
    if spec is None or not spec.origin or not spec.has_location or module.startswith("deltaloom."):
        return []
    path = Path(spec.origin)
    return sorted(path.parent.glob("*.py")) if "." in module or path.name == "__init__.py" else [path]


def _content(path: Path) -> bytes:
    try:
        return sha256(path.read_bytes()).digest()
    except OSError:
        return b""


def _module(function: object) -> str:
    return str(getattr(function, "__module__", None) or type(function).__module__)


@cache
def _source(module: str) -> str:
    """A digest of a module's source where it is not deltaloom's own, which ``_code`` covers."""
    if module.startswith("deltaloom."):
        return ""
    path = getattr(modules.get(module), "__file__", None)
    try:
        return sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except OSError:
        return ""


@cache
def _code() -> str:
    root = Path(__file__).parent.parent
    files: Sequence[Path] = sorted(path for part in CODE for path in (root / part).rglob("*.py"))
    total = sha256()
    for path in files:
        total.update(f"{path.relative_to(root)}\0".encode() + sha256(path.read_bytes()).digest())
    return total.hexdigest()


@cache
def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _short(value: str | None) -> str:
    """A value as a line can show it: digests by their first letters."""
    if value is None:
        return "absent"
    return " ".join(word[:12] if len(word) == 64 and word.isalnum() else word for word in value.split(" "))
