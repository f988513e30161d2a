"""Distributions that look installed: a folder on the path with metadata and modules, made without pip."""

import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

from deltaloom.graph import plugins


class Site:
    """A folder like site-packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def distribution(self, name: str, entries: Mapping[str, str], *, version: str = "1.0", group: str = plugins.GROUP) -> None:
        """Metadata of a distribution with entry points: plugin's name -> target."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = "".join(f"{key} = {target}\n" for key, target in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        plugins.rescan()

    def module(self, name: str, text: str) -> None:
        """A module, or a package's file where the name has dots."""
        path = self.folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))

    def imported(self) -> set[str]:
        """Names of modules that lie in this folder and were imported."""
        found = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
        return {name for name, file in found.items() if file and Path(file).is_relative_to(self.folder)}
