"""``deltaloom bench``: how fast a model runs on this machine, on random weights of any config."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.output import fitted, print_json
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.runtime.decode_bench import DecodeBench, DecodeTime, PeerTime

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
    against: Annotated[
        str | None, typer.Option("--against", help="hf: time transformers on the same weights in the same run.", metavar="ENGINE")
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
    require(against in (None, "hf"), f"--against is '{against}', expected hf", ConfigError)
    batches, contexts = numbers("--batch", batch), numbers("--context", context)
    overrides = dict(settings.value("model", "hf_overrides") or {})
    if layers is not None:
        overrides["num_hidden_layers"] = layers
    subject = read_subject(settings.value("model", "model"), overrides, settings.compile_config())
    made = DecodeBench(subject, seed=seed)
    found = list(made.times(batches, contexts, steps=steps, profile=limits))
    peers = list(made.peer_times(config_fields(subject.folder), batches, contexts, steps=steps)) if against else []
    if as_json:
        rows = {"rows": [as_object(row) for row in found], "peers": [asdict(row) for row in peers]}
        print_json("bench.latency", {"weights": made.weights, "phases": made.phases, **rows})
        return
    print(fitted(report(made, found, peers)))


def config_fields(path: Path) -> dict[str, Any]:
    """The fields of a model's config.json, which was read before."""
    fields: dict[str, Any] = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    return fields


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


def report(made: "DecodeBench", rows: list["DecodeTime"], peers: list["PeerTime"]) -> str:
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
    parts = [columns([header, *cells])]
    if peers:
        ours = {(row.batch, row.context): row.seconds for row in rows}
        lines = [
            (
                one.engine,
                f"{one.batch:,}",
                f"{one.context:,}",
                f"{one.seconds * 1e3:.3f} ms",
                f"{one.seconds / ours[one.batch, one.context]:.2f} x",
            )
            for one in peers
        ]
        parts.append(columns([("against", "batch", "context", "step", "ours is faster by"), *lines]))
    parts.append(f"weights {made.weights / 1e9:.2f} GB; start-up: {start}")
    return "\n\n".join(parts)
