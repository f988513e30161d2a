"""A clean virtual environment with deltaloom as its users have it, an installed wheel; made without a network."""

import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
PARTS = sorted(path.name for path in (ROOT / "src" / "deltaloom").iterdir() if path.is_symlink())
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
INSTALL = ("install", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")


class Environment:
    """``python`` has the libraries of the interpreter that runs the tests, by a .pth file. Its own site-packages come first, and
    links of the outer ones to source trees (.pth files) have no effect in it, so deltaloom is the installed copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
        self.python = folder / "venv" / "bin" / "python"
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self._site_packages() / "outer.pth").write_text("\n".join(sorted(paths)) + "\n")

    def install(self, *trees: Path) -> None:
        """Build and install source trees, from copies, so that no build folder is left in them or comes from them."""
        copies = []
        for tree in trees:
            copies.append(self.tree(tree.name))
            _copy(tree, copies[-1])
        self.check(*PIP, *INSTALL, *map(str, copies))

    def tree(self, name: str) -> Path:
        """The copy of a source tree from which it was installed: away from this repository, whose settings hold below its root."""
        return self.folder / "trees" / name

    def uninstall(self, *names: str) -> None:
        self.check(*PIP, "uninstall", "--yes", *names)

    def run(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """``python arguments``, away from every source tree; ``variables`` of the environment besides."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DELTALOOM"))}
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache"), "NO_COLOR": "1"}
        given = {"cwd": self.folder, "env": kept | cache | variables, "timeout": 600}
        return subprocess.run([str(self.python), *arguments], check=False, capture_output=True, text=True, **given)

    def check(self, *arguments: str, **variables: str) -> str:
        """What such a run prints; ``AssertionError`` with everything that it said if it fails."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def deltaloom(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """The installed command."""
        return self.run("-m", "deltaloom", *arguments, **variables)

    def _site_packages(self) -> Path:
        (found,) = (self.folder / "venv").glob("lib/python*/site-packages")
        return found


def example(name: str) -> Path:
    """The source tree of an example plugin."""
    return EXAMPLES / name


def _copy(tree: Path, copy: Path) -> None:
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*_cache", ".git", ".venv")
    if tree != ROOT:
        shutil.copytree(tree, copy, ignore=leave, dirs_exist_ok=True)
        return
    for name in ("src", *PARTS):
        shutil.copytree(tree / name, copy / name, ignore=leave, symlinks=True, dirs_exist_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy2(tree / name, copy / name)


def installed(folder: Path, trees: Sequence[str]) -> Environment:
    """An environment with deltaloom and some of the example plugins."""
    made = Environment(folder)
    made.install(ROOT, *map(example, trees))
    return made
