"""``deltaloom plugins check``: the conformance kit on everything that a plugin offers, with a table and a report."""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom import __version__
from deltaloom.cli.output import JSON_VERSION
from deltaloom.cli.table import columns
from deltaloom.graph.errors import CompileError, ConfigError, require

if TYPE_CHECKING:
    from deltaloom.testing.suite import Outcome, Status

STATUSES: tuple["Status", ...] = ("passed", "failed", "skipped", "unclaimed")
PACKAGES = ("pytest", "hypothesis", "safetensors")
STDOUT = "-"
KERNEL, MOST_ROWS = "kernel ", 12
"""How the subject of a kernel's checks begins, and with how many kernels a backend still has a row for each."""
EXAMPLES = 25
MOST_EXAMPLES = 100_000


def check(
    name: Annotated[str, typer.Argument(help="The plugin, as `deltaloom plugins list` shows it.")],
    json_file: Annotated[str | None, typer.Option("--json", help="Write the report there; - for stdout.", metavar="FILE")] = None,
    backends: Annotated[
        str | None, typer.Option("--backends", help="Where its ops and models are run, by comma; all that can be if not given.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", help="Generated cases of each check.")] = EXAMPLES,
) -> None:
    """Run the conformance kit on all that a plugin offers: its ops with every kernel, rules, passes, backends and models."""
    require_packages()
    require(1 <= examples <= MOST_EXAMPLES, f"--examples is {examples}, expected 1 to {MOST_EXAMPLES}", ConfigError)
    if json_file not in (None, STDOUT):
        refuse_unwritable(Path(json_file))

    chosen = None if backends is None else [part.strip() for part in backends.split(",") if part.strip()]
    require(chosen != [], f"--backends is '{backends}', which names none", ConfigError)
    with tempfile.TemporaryDirectory(prefix="deltaloom-") as scratch:
        about, found = run_suites(name, chosen, examples, scratch)
    if json_file is not None:
        write_report(json_file, report(about, found))
    print(summary(name, found), file=sys.stderr if json_file == STDOUT else sys.stdout)
    if any(one.status == "failed" for one in found):
        raise typer.Exit(1)


def run_suites(name: str, backends: Sequence[str] | None, examples: int, scratch: str) -> tuple[dict[str, Any], list["Outcome"]]:
    """What was checked, and the outcomes; meanwhile Hypothesis keeps its files in ``scratch``."""
    from hypothesis.configuration import set_hypothesis_home_dir

    from deltaloom.backends import backend
    from deltaloom.testing.op_suite import installed_backends
    from deltaloom.testing.plugin_suites import about_plugin, plugin_suites
    from deltaloom.testing.suite import outcomes

    where = installed_backends() if backends is None else [backend(one) for one in backends]
    about = {"plugin": about_plugin(name), "backends": [one.name for one in where], "examples": examples}
    set_hypothesis_home_dir(scratch)
    try:
        return about, list(shown(outcomes(plugin_suites(name, where), examples=examples), name))
    finally:
        set_hypothesis_home_dir(None)


def require_packages() -> None:
    """``CompileError`` if a package that the kit needs is not installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    hint = "install them with `pip install 'deltaloom[testing]'`"
    require(not missing, f"checking a plugin needs {' and '.join(missing)}; {hint}", CompileError)


def refuse_unwritable(path: Path) -> None:
    """``ConfigError`` before the work, not after it, where the report cannot be written."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {path}: {error.strerror}; give --json another file") from None


def shown(outcomes: Iterable["Outcome"], name: str) -> Iterator["Outcome"]:
    """The outcomes as they come, counted on the terminal."""
    live = sys.stderr.isatty()
    for number, one in enumerate(outcomes, 1):
        if live:
            print(f"\r\x1b[Kchecking {name}: {number}, {one.subject}"[:100], end="", file=sys.stderr, flush=True)
        yield one
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def summary(name: str, found: Sequence["Outcome"]) -> str:
    """A table of counts, then what failed, what was left out, and the verdict."""
    rows = [["", *STATUSES]]
    for row in dict.fromkeys(titles := rows_of(found)):
        counts = Counter(one.status for one, title in zip(found, titles, strict=True) if title == row)
        rows.append([row, *(str(counts[status] or "-") for status in STATUSES)])
    total = Counter(one.status for one in found)
    rows.append(["all", *(str(total[status] or "-") for status in STATUSES)])
    parts = [columns(rows)]
    failed = [f"FAILED {one.subject}: {one.check}\n{_indented(one.text)}" for one in found if one.status == "failed"]
    parts += failed
    reasons = Counter((one.status, one.text) for one in found if one.status in ("skipped", "unclaimed"))
    if reasons:
        parts.append("left out\n" + columns([[str(count), text] for (_, text), count in sorted(reasons.items())], indent="  "))
    verdict = f"{len(failed)} of {len(found)} checks failed" if failed else f"{name} passes: {total['passed']} checks"
    return "\n\n".join([*parts, verdict])


def rows_of(found: Sequence["Outcome"]) -> list[str]:
    """The row of the table for each outcome: its subject, or, where a backend has many kernels, all of them in one."""
    kernels: dict[str, set[str]] = {}
    for one in found:
        if one.subject.startswith(KERNEL):
            kernels.setdefault(one.subject.removeprefix(KERNEL).partition(".")[0], set()).add(one.subject)
    many = {
        subject: f"{len(all_)} kernels of {name}" for name, all_ in kernels.items() if len(all_) > MOST_ROWS for subject in all_
    }
    return [many.get(one.subject, one.subject) for one in found]


def report(about: Mapping[str, Any], found: Sequence["Outcome"]) -> dict[str, Any]:
    """The JSON report: what was checked, the counts, and every check with its outcome."""
    counts = Counter(one.status for one in found)
    checks = [
        {"subject": o.subject, "check": o.check, "status": o.status, "text": o.text, "seconds": round(o.seconds, 4)} for o in found
    ]
    passed = not counts["failed"]
    totals = {status: counts[status] for status in STATUSES}
    head = {"format": "deltaloom.plugins.check", "version": JSON_VERSION, "deltaloom": __version__}
    return {**head, **about, "conforms": passed, "counts": totals, "checks": checks}


def write_report(target: str, content: Mapping[str, Any]) -> None:
    """Write to a file, or to standard output."""
    text = json.dumps(content, indent=2)
    if target == STDOUT:
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {target}: {error.strerror}; give --json another file") from None


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
