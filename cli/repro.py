"""``deltaloom repro``: try a fault again that ``compare`` or ``bisect`` wrote to a folder."""

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.compare import PARTED
from deltaloom.cli.output import print_json


def repro(
    folder: Annotated[Path, typer.Argument(help="A folder that compare or bisect wrote.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the kernel or rewrite in a folder on the numbers beside it. Exits with 1 while it is wrong, with 0 once it is right."""
    from deltaloom.graph.text import print_graph
    from deltaloom.runtime.repro import difference_facts, facts_of, read_repro

    found = read_repro(folder)
    still = found.try_again()
    if as_json:
        print_json("repro", {**facts_of(found), "difference": difference_facts(still)})
    else:
        print(print_graph(found.graph).rstrip())
        print(f"found then: {found.sentence}")
        print("now: it is right" if still is None else f"now: wrong, {still}")
    if still is not None:
        raise typer.Exit(PARTED)
