"""``deltaloom plugins new``: a folder with a plugin that works, to begin from."""

import errno
import keyword
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Collection, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from deltaloom import __version__
from deltaloom.cli.output import print_json
from deltaloom.graph.errors import ConfigError, require

DESCRIPTIONS: Mapping[str, str] = {
    "op": "An op with a kernel for the numpy backend",
    "backend": "A backend on the CPU with a kernel of its own",
    "pass": "A pass over graphs, and a rewrite rule",
    "model": "A model family",
}
USAGE: Mapping[str, str] = {
    "op": "In a model's graph the op is `g.$name.squared_relu(x)`.",
    "backend": "`deltaloom generate --backend $name,numpy` runs a model on it.",
    "pass": (
        "The rule is applied wherever the plugin is installed. The pass runs where a pipeline names it: `pipeline = [\n"
        '"$name.sorted_inputs", ...]` in a configuration file.'
    ),
    "model": 'A checkpoint whose config.json has the `model_type` "$name" is read, built and run like any other.',
}
NAME = re.compile(r"[a-z][a-z0-9_]*")
SUFFIX = ".template"
LONGEST = 64


def new(
    name: Annotated[str, typer.Argument(help="Its name: a lower-case identifier, such as mylab.")],
    kind: Annotated[str, typer.Option("--kind", help="What it offers to begin with: op, backend, pass or model.")],
    into: Annotated[Path, typer.Option("--into", help="The folder in which its folder is made.", metavar="FOLDER")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as one JSON object.")] = False,
) -> None:
    """Make a folder with a working plugin: a distribution with code, a test file of one line and a page on how to use it."""
    made = scaffold(name, kind, into)
    if as_json:
        found = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
        print_json("plugins.new", {"plugin": name, "kind": kind, "folder": str(made), "files": found})
        return
    print(f"made {made}\n")
    print(f"  cd {shlex.quote(str(made))}\n  pip install -e '.[testing]'\n  deltaloom plugins check {name}")


def scaffold(name: str, kind: str, into: Path) -> Path:
    """Make the plugin's folder in ``into`` and give its path. ``ConfigError`` for a bad name or kind, a folder that is there
    already and one that cannot be written; then nothing is left behind."""
    known = f"there is no kind '{kind[:LONGEST]}' of plugin; expected one of {', '.join(DESCRIPTIONS)}"
    require(kind in DESCRIPTIONS, known, ConfigError)
    check_name(name)
    require(into.is_dir(), f"--into is {into}, which is no folder; make it first, or name another", ConfigError)
    distribution = f"deltaloom-{name.replace('_', '-')}"
    target = into / distribution
    there = f"{target} is there already; move it away, or choose another name or another --into"
    require(not os.path.lexists(target), there, ConfigError)
    words = {"name": name, "distribution": distribution, "package": f"deltaloom_{name}", "version": __version__}
    words["description"] = DESCRIPTIONS[kind]
    words["usage"] = Template(USAGE[kind]).substitute(words)
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{distribution}-", dir=into))
    except OSError as error:
        raise ConfigError(f"nothing can be made in {into}: {error.strerror}; choose another folder with --into") from None
    try:
        write(unfinished, kind, words)
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(target)
    except OSError as error:
        taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY)
        raise ConfigError(there if taken else f"{target} cannot be written: {error.strerror}; choose another --into") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def check_name(name: str) -> None:
    """``ConfigError`` for a name that no plugin can have."""
    found = f"'{name[:LONGEST]}' cannot be the name of a plugin"
    wanted = "expected lower-case letters, digits and _, a letter first, as in mylab"
    require(bool(NAME.fullmatch(name)), f"{found}: {wanted}", ConfigError)
    require(len(name) <= LONGEST, f"{found}: it has {len(name)} characters, expected at most {LONGEST}", ConfigError)
    require(not keyword.iskeyword(name) and name != "deltaloom", f"{found}: the word is taken; {wanted}", ConfigError)
    for what, names in reserved().items():
        require(name not in names, f"{found}: deltaloom itself has the {what} '{name}'; choose another", ConfigError)


def reserved() -> Mapping[str, Collection[str]]:
    """Names that are taken: the plugin's becomes that of its backend and its model type, and the first part of its ops' names."""
    from deltaloom.backends import TABLE as BACKENDS
    from deltaloom.models.families import FAMILIES
    from deltaloom.ops import TABLE as OPS

    return {"op": OPS, "backend": BACKENDS, "model type": FAMILIES}


def write(folder: Path, kind: str, words: Mapping[str, str]) -> None:
    """Every template of ``kind`` with its words filled in."""
    templates = files("deltaloom.cli") / "templates"
    source, tests = folder / "src" / words["package"], folder / "tests"
    for made in (source, tests):
        made.mkdir(parents=True)
    for template in sorted(templates.iterdir(), key=lambda entry: entry.name):
        if template.name.endswith(SUFFIX):
            _fill(template, tests if template.name.startswith("test_") else folder, words)
    for template in sorted((templates / kind).iterdir(), key=lambda entry: entry.name):
        _fill(template, source, words)


def _fill(template: Traversable, folder: Path, words: Mapping[str, str]) -> None:
    text = Template(template.read_text(encoding="utf-8")).substitute(words)
    (folder / template.name.removesuffix(SUFFIX)).write_text(text, encoding="utf-8")


def _umask() -> int:
    """The process's umask, which can be read only by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
