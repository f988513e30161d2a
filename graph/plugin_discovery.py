"""What is installed: the entry points of plugins, read from the metadata of distributions; nothing of theirs is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from deltaloom.graph.errors import ConfigError, PluginError, require
from deltaloom.graph.plugin import GROUP, Kind, Plugin

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

State = Literal["found", "loaded", "failed", "blocked"]
CHOICE, STRICT = "DELTALOOM_PLUGINS", "DELTALOOM_PLUGINS_STRICT"
"""Environment variables: which plugins may be loaded (``none``, or names by comma), and whether a failure is an error."""
NONE = "none"
HERE = "registered in this process"


@dataclass
class Record:
    """What is known of one plugin. ``reason``: why it failed or is blocked, with the original exception as ``cause``.

    ``problems``: kind and name of an offer that turned out to be unusable -> why; the plugin's other offers can be used."""

    name: str
    state: State = "found"
    distribution: str = ""
    version: str = ""
    target: str = ""
    reason: str = ""
    cause: BaseException | None = None
    plugin: Plugin | None = None
    entry: EntryPoint | None = field(default=None, repr=False)
    problems: dict[tuple[Kind, str], str] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set, repr=False)

    @property
    def origin(self) -> str:
        """The distribution and its version, or that it was registered, or is missing."""
        return f"{self.distribution} {self.version}".strip() or (HERE if self.plugin else "not installed")

    @property
    def title(self) -> str:
        """The plugin and where it comes from, as sentences name it."""
        return f"plugin '{self.name}' ({self.origin})"

    def fail(self, reason: str, cause: BaseException | None = None) -> None:
        """Record why the plugin cannot be used."""
        self.state, self.reason, self.cause = "failed", reason, cause

    def error(self) -> PluginError:
        """What whoever asked for it by name is told."""
        made = PluginError(f"the {self.title} {'is blocked' if self.state == 'blocked' else 'cannot be used'}: {self.reason}")
        made.__cause__ = self.cause
        return made


def installed() -> list[Record]:
    """A record for each entry point of the group, by name; blocked ones by ``DELTALOOM_PLUGINS``, failed ones where two
    distributions have one name."""
    entries = sorted(_entries(), key=lambda found: (found[1].name, found[0].name, found[1].value))
    records = [Record(e.name, "found", d.name or "unknown", d.version or "", e.value, entry=e) for d, e in entries]
    allowed = chosen()
    for record in records:
        rivals = [other for other in records if other.name == record.name]
        if allowed is not None and record.name not in allowed:
            record.state, record.reason = "blocked", f"{CHOICE} is '{os.environ.get(CHOICE, '')}', which does not name it"
        elif len(rivals) > 1:
            owners = " and ".join(f"{rival.origin} ({rival.target})" for rival in rivals)
            record.fail(f"the name is taken by {owners}; uninstall all but one")
    absent = sorted(set(allowed or ()) - {record.name for record in records})
    return records + [Record(name, "failed", reason=f"{CHOICE} names it, but it is not installed") for name in absent]


def chosen() -> tuple[str, ...] | None:
    """The names that ``DELTALOOM_PLUGINS`` lets be loaded; None: all."""
    value = os.environ.get(CHOICE, "").strip()
    if not value:
        return None
    return () if value == NONE else tuple(name.strip() for name in value.split(",") if name.strip())


def strict(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether every recorded failure is an error. ``ConfigError`` for a value that says neither."""
    value = environment.get(STRICT, "").strip()
    require(value in ("", "0", "1"), f"{STRICT} is '{value}', expected 1 or 0", ConfigError)
    return value == "1"


def _entries() -> Iterator[tuple[Distribution, EntryPoint]]:
    """The group's entry points, each distribution once: the one that comes first on the path."""
    from importlib.metadata import distributions  # takes 10 ms, which most commands need not wait for

    seen: set[str] = set()
    for distribution in distributions():
        try:
            text = distribution.read_text("entry_points.txt")
        except (OSError, UnicodeDecodeError):
            continue
        if not text or GROUP not in text:
            continue
        found = [entry for entry in distribution.entry_points if entry.group == GROUP]
        name = (distribution.name or "").lower().replace("-", "_").replace(".", "_")
        if found and name not in seen:
            seen.add(name)
            yield from ((distribution, entry) for entry in found)
