"""``deltaloom bench``: how fast a model runs on this machine, on random weights of any config."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.output import fitted, print_json
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.runtime.decode_bench import DecodeBench, DecodeTime

bench = typer.Typer(name="bench", help="Time a model on this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.callback()
def about() -> None:
    """Time a model on this machine."""


@bench.command()
def latency(
    ctx: typer.Context,
    model: options.Looked = None,
    batch: Annotated[str, typer.Option("--batch", help="Sequences of a step; several by comma.")] = "1",
    context: Annotated[str, typer.Option("--context", help="Tokens that each sequence has; several by comma.")] = "1024",
    steps: Annotated[int, typer.Option("--steps", help="Steps of whose times the median is shown.")] = 50,
    layers: Annotated[int | None, typer.Option("--layers", help="Only so many of the model's layers.")] = None,
    seed: Annotated[int, typer.Option("--random-seed", help="Of the weights, states and tokens.")] = 0,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Limits of the device, for the floor: a TOML or JSON file, h100, h200.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    skip: options.Skip = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Time recorded decode steps on random weights, which the device draws; reads no weights, so a config.json alone will do."""
    from deltaloom.runtime.decode_bench import DecodeBench
    from deltaloom.runtime.device_profile import named_profile
    from deltaloom.runtime.subject import read_subject

    settings = Settings(ctx.params, config)
    limits = None if profile is None else named_profile(profile)
    batches, contexts = numbers("--batch", batch), numbers("--context", context)
    overrides = dict(settings.value("model", "hf_overrides") or {})
    if layers is not None:
        overrides["num_hidden_layers"] = layers
    subject = read_subject(settings.value("model", "model"), overrides, settings.compile_config())
    made = DecodeBench(subject, seed=seed)
    found = list(made.times(batches, contexts, steps=steps, profile=limits))
    if as_json:
        print_json("bench.latency", {"weights": made.weights, "phases": made.phases, "rows": [as_object(row) for row in found]})
        return
    print(fitted(report(made, found)))


def numbers(flag: str, text: str) -> list[int]:
    """The whole numbers of a flag that takes several. ``ConfigError`` for anything else."""
    parts = [part.strip() for part in text.split(",")]
    good = all(part.isdecimal() and part.isascii() for part in parts)
    require(good, f"{flag} is '{text}', expected whole numbers with commas between them, for example 1,8,64", ConfigError)
    return [int(part) for part in parts]


def as_object(row: "DecodeTime") -> dict[str, Any]:
    """A row as JSON; times in seconds, and in milliseconds under the name that other engines give them."""
    return asdict(row) | {
        "layer": row.layer,
        "median_tpot_ms": row.seconds * 1000,
        "output_throughput": row.tokens_per_second,
    }


def report(made: "DecodeBench", rows: list["DecodeTime"]) -> str:
    """The rows as a table, and what came before them."""
    header = ("batch", "context", "step", "a layer", "tokens/s", "of floor", "states", "logits")
    cells = [
        (
            f"{row.batch:,}",
            f"{row.context:,}",
            f"{row.seconds * 1e3:.3f} ms",
            f"{row.layer * 1e6:.1f} us",
            f"{row.tokens_per_second:,.0f}",
            "" if row.floor is None else f"{100 * row.floor / row.seconds:.0f} %",
            f"{row.states / 1e9:.2f} GB",
            "finite" if row.finite else "NOT FINITE",
        )
        for row in rows
    ]
    phases = {**made.phases, "record": sum(row.record for row in rows)}
    start = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
    return f"{columns([header, *cells])}\n\nweights {made.weights / 1e9:.2f} GB; start-up: {start}"
