"""``deltaloom ops``: the ops, their rules, and the kernels that each backend has for them."""

import inspect as introspection
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli.output import print_json
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.runtime.op_coverage import Coverage, OpCoverage

PORTABLE = ("reference", "portable")
"""Titles of kernels that are a rule of the op."""


def ops(
    name: Annotated[str | None, typer.Argument(help="One op in full; all of them if not given.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the documentation: built-in ops.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the ops, their rules and their kernels, or show one op in full."""
    require(not (markdown and (name or as_json)), "--markdown prints all ops as text; leave the name and --json out", ConfigError)
    from deltaloom.runtime.op_coverage import coverage

    if markdown:
        print(page(coverage(plugins=False)), end="")
        return
    found = coverage(None if name is None else [name])
    if as_json:
        print_json("ops", as_object(found))
        return
    print(overview(found) if name is None else details(found.ops[0]))
    for problem in found.missing.values():
        print(f"\n{problem}")


def overview(found: "Coverage") -> str:
    """One line an op: rules as marks, kernels as counts (``1+reference``: one accelerated, and the op's own rule)."""
    from deltaloom.runtime.op_coverage import RULES

    rows: list[list[str]] = [["op", *RULES, *found.backends]]
    for row in found.ops:
        marks = ("x" if rule in row.rules else "-" for rule in RULES)
        rows.append([row.op.name, *marks, *(kernel_count(row, backend) for backend in found.backends)])
    return columns(rows)


def kernel_count(row: "OpCoverage", backend: str) -> str:
    """``2+reference``; ``parts`` for an op that runs in parts only, ``-`` for one that does not run."""
    titles = row.kernels[backend]
    own = sum(title not in PORTABLE for title in titles)
    shown = "+".join([*([str(own)] if own else []), *(title for title in titles if title in PORTABLE)])
    return shown or ("parts" if row.reach[backend] == "parts" else "-")


def details(row: "OpCoverage") -> str:
    """Everything about one op."""
    op = row.op
    low, high = op.arity()
    names = op.input_names()
    inputs = ", ".join(names) + (" ..." if high > len(names) else "")
    optional = f" ({low} needed)" if low < len(names) else ""
    facts = [
        ("op", f"{op.name}, version {op.version}"),
        ("inputs", inputs + optional),
        ("attributes", ", ".join(f"{field.name}: {field.type}" for field in fields(op)) or "none"),  # type: ignore[arg-type]
        ("outputs", ", ".join(op.outputs)),
        ("rules", ", ".join(row.rules)),
        ("sharding", op.sharding or ("by its attributes" if "sharding" in row.rules else "replicate")),
        ("laws", ", ".join(type(law).__name__ for law in op.laws) or "none"),
        ("defined in", op.__module__),
    ]
    for backend, titles in row.kernels.items():
        shown = ", ".join(f"{backend}.{title}" for title in titles)
        facts.append((f"on {backend}", shown or ("in parts" if row.reach[backend] == "parts" else "none")))
    return f"{columns(facts)}\n\n{introspection.getdoc(op) or ''}".rstrip()


def as_object(found: "Coverage") -> dict[str, Any]:
    """The table as JSON."""
    rows = [
        {
            "op": row.op.name,
            "version": row.op.version,
            "formula": row.formula,
            "rules": list(row.rules),
            "kernels": {name: list(titles) for name, titles in row.kernels.items()},
            "reach": dict(row.reach),
        }
        for row in found.ops
    ]
    limits = [vars(limit) for limit in found.limitations]
    return {"ops": rows, "backends": list(found.backends), "limitations": limits, "missing": dict(found.missing)}


def page(found: "Coverage") -> str:
    """The page of the documentation."""
    return "\n".join(page_lines(found)) + "\n"


def page_lines(found: "Coverage") -> Iterator[str]:
    from deltaloom.runtime.op_coverage import RULES

    yield from (
        "# Ops",
        "",
        "Written by `deltaloom ops --markdown`; a test compares it with the registry. `deltaloom ops NAME` shows one op in full,",
        "`deltaloom explain` which kernel a model's nodes get. Under a backend are the number of kernels of its own, and whether",
        "the op's own rule (`reference` on NumPy, `portable` elsewhere) stands behind them; *parts*: it runs as its decomposition.",
        "",
        f"| op | {' | '.join(RULES)} | {' | '.join(found.backends)} | what it computes |",
        f"| --- {'| --- ' * (len(RULES) + len(found.backends))}| --- |",
    )
    for row in found.ops:
        marks = " | ".join("x" if rule in row.rules else "" for rule in RULES)
        kernels = " | ".join(kernel_count(row, backend) for backend in found.backends)
        yield f"| `{row.op.name}` | {marks} | {kernels} | {escaped(row.formula)} |"
    yield from ("", "## Limitations", "", "| backend | op | what it does not do |", "| --- | --- | --- |")
    for limit in found.limitations:
        yield f"| {limit.backend} | {f'`{limit.op}`' if limit.op else 'all'} | {escaped(limit.reason)} |"


def escaped(text: str) -> str:
    """``text`` in a cell of a table, where stars and bars would mean something outside of code."""
    parts = text.split("``")
    return "".join(f"`{part}`" if number % 2 else re.sub(r"([|*_<])", r"\\\1", part) for number, part in enumerate(parts))
