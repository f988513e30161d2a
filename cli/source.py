"""``deltaloom source``: a program as the Python that the compiler emits for it."""

from typing import Annotated

import typer

from deltaloom.cli import options
from deltaloom.cli.inspect import look_at
from deltaloom.cli.output import print_json
from deltaloom.cli.settings import Settings
from deltaloom.graph.errors import ConfigError, require


def source(
    ctx: typer.Context,
    first: Annotated[
        str | None, typer.Argument(help="Model: checkpoint folder, its config.json alone, or bundled name.", metavar="[MODEL]")
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(help="prefill, decode (the default), mixed, serving_decode or verify.", metavar="[PROGRAM]"),
    ] = None,
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
    """Print a program as Python that runs where it is pasted into a file; reads no weights."""
    from deltaloom.runtime.compile import PROGRAMS

    model, program = (None, first) if second is None and first in PROGRAMS else (first, second or "decode")
    known = ", ".join(PROGRAMS)
    require(program in PROGRAMS, f"there is no program '{program}'; there is {known}", ConfigError)
    assert program is not None
    text = look_at(Settings({**ctx.params, "model": model}, config)).compiled().source(program)
    print_json("source", {"program": program, "source": text}) if as_json else print(text)
