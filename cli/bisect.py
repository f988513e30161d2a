"""``deltaloom bisect``: which pass, and which rewrite of it, changes what a model computes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.compare import PARTED, PROMPT, token_ids
from deltaloom.cli.output import print_json
from deltaloom.cli.settings import Settings

if TYPE_CHECKING:
    from deltaloom.runtime.bisect import Bisection


def bisect(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or bundled name; tiny-next if not given.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The text that is tried, and a decode step after it.")] = PROMPT,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Token ids by comma in place of a text.", metavar="IDS")] = None,
    repro: Annotated[
        Path | None, typer.Option("--repro", help="Write the rewrite that is wrong, alone, to this new folder.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    quantise: options.Quantise = None,
    keep_quantized: options.KeepQuantized = None,
    skip: options.Skip = None,
    fuel: options.Fuel = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Interpret the graph after each pass, in float64, and name the first pass and rewrite that change a result. Exits with 1 if
    there is one."""
    from deltaloom.runtime.bisect import bisect as run

    settings = Settings(ctx.params, config)
    name, overrides = settings.value("model", "model"), settings.value("model", "hf_overrides")
    ids = token_ids(name, prompt, tokens)
    found = run(name, config=settings.compile_config(), ids=ids, hf_overrides=overrides)
    print_json("bisect", _object(found)) if as_json else print(_text(found))
    if repro is not None and found.culprit is not None:
        _write(found, name, repro, as_json)
    if found.culprit is not None:
        raise typer.Exit(PARTED)


def _text(found: "Bisection") -> str:
    lines = [f"{'right' if trial.good else 'WRONG':6} {trial.what}" for trial in found.trials]
    last = "no pass changes what is computed" if found.culprit is None else f"{found.culprit}, made at {found.culprit.source}"
    return "\n".join([*lines, f"{len(found.trials)} graphs and {found.rewrites} rewrites: {last}"])


def _object(found: "Bisection") -> dict[str, Any]:
    from deltaloom.runtime.repro import difference_facts

    plain = {"rewrites": found.rewrites, "trials": [vars(trial) for trial in found.trials]}
    if found.culprit is None:
        return {**plain, "culprit": None}
    keys = ("program", "pass_name", "rewrite", "rule", "node", "body", "value", "source")
    facts = {key: getattr(found.culprit, key) for key in keys}
    facts |= {"difference": difference_facts(found.culprit.difference), "sentence": str(found.culprit)}
    return {**plain, "culprit": facts}


def _write(found: "Bisection", model: str, folder: Path, quiet: bool) -> None:
    from deltaloom.models.bundled import model_folder
    from deltaloom.models.checkpoint import Checkpoint
    from deltaloom.runtime.repro import write_repro
    from deltaloom.runtime.shrink import repro_of_culprit

    assert found.culprit is not None
    with Checkpoint.open(model_folder(model)) as checkpoint:
        write_repro(repro_of_culprit(found.culprit, checkpoint), folder)
    if not quiet:
        print(f"written to {folder}; `deltaloom repro {folder}` tries it again")
