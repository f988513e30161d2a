"""``deltaloom bench``: how fast a model runs on this machine, on random weights of any config."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.memory import size
from deltaloom.cli.output import fitted, print_json
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.runtime.decode_bench import DecodeBench, DecodeTime, Memory, PeerTime, Throughput
    from deltaloom.runtime.device_profile import DeviceProfile
    from deltaloom.runtime.subject import Subject

bench = typer.Typer(name="bench", help="Time a model on this machine.", no_args_is_help=True, rich_markup_mode=None)

Batch = Annotated[str, typer.Option("--batch", help="Sequences of a step; several by comma.")]
ContextTokens = Annotated[str, typer.Option("--context", help="Tokens that each sequence has; several by comma.")]
Steps = Annotated[int, typer.Option("--steps", help="Steps that are timed.")]
Layers = Annotated[int | None, typer.Option("--layers", help="Only so many of the model's layers.")]
RandomSeed = Annotated[int, typer.Option("--random-seed", help="Of the weights, states and tokens.")]
Profile = Annotated[
    str | None, typer.Option("--profile", help="Limits of the device, for the floor: a TOML or JSON file, h100, h200.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@bench.callback()
def about() -> None:
    """Time a model on this machine."""


@bench.command()
def latency(
    ctx: typer.Context,
    model: options.Looked = None,
    batch: Batch = "1",
    context: ContextTokens = "1024",
    steps: Steps = 50,
    layers: Layers = None,
    seed: RandomSeed = 0,
    profile: Profile = None,
    against: Annotated[
        str | None, typer.Option("--against", help="hf: time transformers on the same weights in the same run.", metavar="ENGINE")
    ] = None,
    as_json: AsJson = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    skip: options.Skip = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Time decode steps on random weights, which the device draws; reads no weights, so a config.json alone will do."""
    limits = chosen_profile(profile)
    require(against in (None, "hf"), f"--against is '{against}', expected hf", ConfigError)
    batches, contexts = numbers("--batch", batch), numbers("--context", context)
    subject = chosen_subject(Settings(ctx.params, config), layers)
    made = made_bench(subject, seed)
    found = list(made.times(batches, contexts, steps=steps, profile=limits))
    peers = list(made.peer_times(config_fields(subject.folder), batches, contexts, steps=steps)) if against else []
    if as_json:
        rows = {"rows": [as_object(row) for row in found], "peers": [asdict(row) for row in peers]}
        print_json("bench.latency", {**facts(made), **rows})
        return
    print(fitted(report(made, found, peers)))


@bench.command()
def throughput(
    ctx: typer.Context,
    model: options.Looked = None,
    batch: Batch = "1,8,64",
    context: ContextTokens = "1024",
    steps: Steps = 50,
    layers: Layers = None,
    seed: RandomSeed = 0,
    profile: Profile = None,
    as_json: AsJson = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    skip: options.Skip = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Time steady decoding as a client sees it: tokens reach the host, on random weights as in latency."""
    limits = chosen_profile(profile)
    batches, contexts = numbers("--batch", batch), numbers("--context", context)
    made = made_bench(chosen_subject(Settings(ctx.params, config), layers), seed)
    found = [made.throughput(one, tokens, steps=steps, profile=limits) for tokens in contexts for one in batches]
    if as_json:
        print_json("bench.throughput", {**facts(made), "rows": [throughput_object(row) for row in found]})
        return
    print(fitted(throughput_report(made, found)))


@bench.command()
def kernels(
    ctx: typer.Context,
    model: options.Looked = None,
    batch: Batch = "1",
    context: ContextTokens = "1024",
    layers: Layers = None,
    seed: RandomSeed = 0,
    profile: Profile = None,
    as_json: AsJson = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    skip: options.Skip = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Time every kernel of a decode step alone, beside its bytes and floor, on random weights as in latency."""
    from deltaloom.cli.bench_kernels import kernel_object, kernel_report
    from deltaloom.runtime.step_kernels import kernel_times

    limits = chosen_profile(profile)
    batches, contexts = numbers("--batch", batch), numbers("--context", context)
    made = made_bench(chosen_subject(Settings(ctx.params, config), layers), seed)
    found = [(one, tokens, kernel_times(made, one, tokens, profile=limits)) for tokens in contexts for one in batches]
    if as_json:
        steps = [{"batch": one, "context": tokens, "rows": [kernel_object(row) for row in rows]} for one, tokens, rows in found]
        print_json("bench.kernels", {**facts(made), "steps": steps})
        return
    print(fitted("\n\n".join(kernel_report(*one) for one in found)))


@bench.command()
def startup(
    ctx: typer.Context,
    model: options.Looked = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of the step.")] = 1,
    context: Annotated[int, typer.Option("--context", help="Tokens that each sequence has.")] = 1024,
    layers: Layers = None,
    seed: RandomSeed = 0,
    once: Annotated[bool, typer.Option("--once", help="Only in this process, with the kernel caches as they are.")] = False,
    as_json: AsJson = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    skip: options.Skip = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Time each phase until the first token, in a fresh process with empty kernel caches and in one that finds them filled."""
    from deltaloom.cli.bench_startup import fresh_runs, phases_here, startup_report

    settings = Settings(ctx.params, config)
    if once:
        found = [{"cache": "as it is", "phases": phases_here(settings, layers, seed, batch, context)}]
    else:
        found = fresh_runs(ctx)
    if as_json:
        print_json("bench.startup", {"batch": batch, "context": context, "runs": found})
        return
    print(fitted(startup_report(found)))


def chosen_profile(name: str | None) -> "DeviceProfile | None":
    """The limits that --profile names."""
    from deltaloom.runtime.device_profile import named_profile

    return None if name is None else named_profile(name)


def chosen_subject(settings: Settings, layers: int | None) -> "Subject":
    """The model that is timed, cut to ``layers``."""
    from deltaloom.runtime.subject import read_subject

    overrides = dict(settings.value("model", "hf_overrides") or {})
    if layers is not None:
        overrides["num_hidden_layers"] = layers
    return read_subject(settings.value("model", "model"), overrides, settings.compile_config())


def made_bench(subject: "Subject", seed: int) -> "DecodeBench":
    """The subject's decode program on random weights."""
    from deltaloom.runtime.decode_bench import DecodeBench

    return DecodeBench(subject, seed=seed)


def facts(made: "DecodeBench") -> dict[str, Any]:
    """What all steps have in common, as JSON; bytes and seconds."""
    return {"weights": made.weights, "planned": asdict(made.planned), "phases": made.phases}


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
    header = ("batch", "context", "step", "a layer", "tokens/s", "of floor", "states", "in use", "peak")
    cells = [
        (
            f"{row.batch:,}",
            f"{row.context:,}",
            f"{row.seconds * 1e3:.3f} ms",
            f"{row.layer * 1e6:.1f} us",
            f"{row.tokens_per_second:,.0f}",
            "" if row.floor is None else f"{100 * row.floor / row.seconds:.0f} %",
            size(row.states),
            size(row.allocated),
            size(row.peak),
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
    parts += [looked(rows), memory_line(made), f"start-up: {start}"]
    return "\n\n".join(parts)


def looked(rows: "list[DecodeTime] | list[Throughput]") -> str:
    """Whether every logit was finite; all steps are looked at."""
    bad = [f"batch {row.batch} at {row.context:,} tokens" for row in rows if not row.finite]
    every = sum(row.checked for row in rows)
    return f"logits NOT FINITE: {', '.join(bad)}" if bad else f"logits: every one of {every:,} steps finite"


def memory_line(made: "DecodeBench") -> str:
    """Memory by types alone, and the weights as they are."""
    plan: Memory = made.planned
    planned = f"weights {size(plan.weights)}, {plan.token:,} bytes a token, {size(plan.sequence)} a sequence"
    return f"memory planned: {planned}; weights measured: {size(made.weights)}"


def throughput_object(row: "Throughput") -> dict[str, Any]:
    """A row as JSON, with the names that other engines give its figures; milliseconds."""
    import numpy as np

    middle, late = (float(np.percentile(row.gaps, part)) * 1000 for part in (50, 99))
    return asdict(row) | {
        "mean_tpot_ms": row.step * 1000,
        "mean_itl_ms": row.step * 1000,
        "median_itl_ms": middle,
        "p99_itl_ms": late,
        "output_throughput": row.tokens_per_second,
    }


def throughput_report(made: "DecodeBench", rows: list["Throughput"]) -> str:
    """The rows as a table."""
    lines: list[tuple[str, ...]] = [
        ("batch", "context", "TPOT", "median ITL", "p99 ITL", "output tokens/s", "of floor", "in use", "peak")
    ]
    for row in rows:
        found = throughput_object(row)
        floor = "" if row.floor is None else f"{100 * row.floor / row.step:.0f} %"
        times = [f"{found[name]:.3f} ms" for name in ("mean_tpot_ms", "median_itl_ms", "p99_itl_ms")]
        held = size(row.allocated), size(row.peak)
        lines.append((f"{row.batch:,}", f"{row.context:,}", *times, f"{row.tokens_per_second:,.0f}", floor, *held))
    return "\n\n".join([columns(lines), looked(rows), memory_line(made)])
