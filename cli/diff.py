"""``deltaloom diff``: what changed in the graph between two stages of the compiler, or between two programs."""

from typing import Annotated

import typer

from deltaloom.cli import options
from deltaloom.cli.inspect import look_at
from deltaloom.cli.output import coloured, fitted, print_json
from deltaloom.cli.settings import Settings

RED, GREEN, PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[0m"


def diff(
    ctx: typer.Context,
    before: Annotated[str, typer.Argument(help="A stage: given, PASS, shared, prefill, decode, mixed, decode.PASS, …")],
    after: Annotated[str, typer.Argument(help="Another one.")],
    model: options.Looked = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    keep_quantized: options.KeepQuantized = None,
    mesh: options.Mesh = None,
    skip: options.Skip = None,
    fuel: options.Fuel = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show what changed in each body of a model's graph between two stages; reads no weights."""
    from deltaloom.graph.diff import body_diffs

    compiled = look_at(Settings(ctx.params, config)).compiled()
    bodies = body_diffs(compiled.graph(before), compiled.graph(after))
    if as_json:
        found = [{**vars(one), "nodes": list(one.nodes), "lines": [list(line) for line in one.lines]} for one in bodies]
        print_json("diff", {"before": before, "after": after, "bodies": found})
    elif bodies:
        print(painted(fitted("\n".join(map(str, bodies)))))
    else:
        print(f"nothing changed between {before} and {after}")


def painted(text: str) -> str:
    """Red and green lines where the terminal has colours."""
    if not coloured():
        return text
    marks = {"  -": RED, "  +": GREEN, "  ~ -": RED, "  ~ +": GREEN}
    lines = []
    for line in text.splitlines():
        colour = next((colour for mark, colour in marks.items() if line.startswith(mark)), "")
        lines.append(f"{colour}{line}{PLAIN}" if colour else line)
    return "\n".join(lines)
