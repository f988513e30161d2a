"""``deltaloom roofline``: the least time of every op on a device, and beside it the time that it takes."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.output import amount, fitted, print_json, quantity
from deltaloom.cli.roofline_plot import plot
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.passes.config import CompileConfig
    from deltaloom.passes.pipeline import Context
    from deltaloom.runtime.device_profile import DeviceProfile
    from deltaloom.runtime.roofline import Roofline, Row, Step

ROW = ("body", "op", "kernel", "nodes", "calls", "dtype", "bound", "seconds", "ratio")
"""What the JSON of a row has besides its work."""
DECODE_CONTEXT = 1024
"""Tokens that a decode step finds in its state unless --context says otherwise."""


def roofline(
    ctx: typer.Context,
    model: options.Looked = None,
    kind: Annotated[str, typer.Option("--program", help="decode (one token a sequence) or prefill (many).")] = "decode",
    tokens: Annotated[int | None, typer.Option("--tokens", help="New tokens a sequence; a prefill chunk if not given.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of the step.")] = 1,
    context: Annotated[
        int | None, typer.Option("--context", help=f"Tokens that each state holds before; {DECODE_CONTEXT}, or 0 in prefill.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Limits of the device: a TOML or JSON file, h100, h200.", metavar="FILE")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this device again, even if it was before.")] = False,
    predicted: Annotated[bool, typer.Option("--predicted", help="Run nothing, even where there are weights.")] = False,
    repetitions: Annotated[int | None, typer.Option("--repetitions", help="Runs of whose times the median is shown.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw the plot into this file.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    threads: options.Threads = None,
    quantise: options.Quantise = None,
    keep_quantized: options.KeepQuantized = None,
    mesh: options.Mesh = None,
    skip: options.Skip = None,
    cache: options.Cache = None,
    no_cache: options.NoCache = False,
    max_model_len: options.MaxModelLen = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show the least time that every op of a step can take on a device and, with weights, the time that it takes."""
    require(not (profile and measure), "--profile and --measure exclude each other; give one of them", ConfigError)
    settings = Settings(ctx.params, config)
    compiled_as = settings.compile_config()
    step = chosen_step(kind, tokens, batch, context, compiled_as.prefill_chunk)
    without = predicted or bool(compiled_as.mesh) or settings.value("model", "model").endswith(".json")
    require(not (without and repetitions), "--repetitions needs a run, which needs weights and an undivided model", ConfigError)
    limits = chosen_limits(profile, None if no_cache or profile else profile_folder(compiled_as), again=measure)
    found = predicted_roofline(settings, step, limits) if without else measured_roofline(settings, step, limits, repetitions)
    if svg is not None:
        write_plot(svg, found)
    if as_json:
        print_json("roofline", as_object(found))
    else:
        print(fitted(report(found)))


def chosen_step(kind: str, tokens: int | None, batch: int, context: int | None, chunk: int) -> "Step":
    """The step that the flags ask for."""
    from deltaloom.runtime.roofline import Step

    if kind == "decode":
        return Step("decode", batch, 1 if tokens is None else tokens, DECODE_CONTEXT if context is None else context)
    require(kind == "prefill", f"--program is {kind!r}, expected prefill or decode", ConfigError)
    return Step("prefill", batch, chunk if tokens is None else tokens, context or 0)


def profile_folder(config: "CompileConfig") -> Path | None:
    """Where measured profiles are kept: in the folder of the compile cache, or the default one; None, with a warning, where that is
    not private."""
    from deltaloom.passes.cache import CacheWarning, default_folder, folder_fault
    from deltaloom.passes.config import CACHE_DEFAULT, CACHE_OFF

    if config.cache not in (CACHE_DEFAULT, CACHE_OFF):
        return Path(config.cache).expanduser()
    folder = default_folder()
    fault = folder_fault(folder)
    if fault is not None:
        warnings.warn(f"the device's profile is not kept: {fault}", CacheWarning, stacklevel=2)
    return folder if fault is None else None


@dataclass(frozen=True)
class Limits:
    """Where the device's limits come from: ``given``, otherwise measured and kept in ``folder``."""

    given: "DeviceProfile | None"
    folder: Path | None
    again: bool

    def profile(self, context: "Context") -> "DeviceProfile":
        """The profile for what a model is compiled with."""
        from deltaloom.runtime.device_limits import device_profile

        return self.given or device_profile(context, folder=self.folder, again=self.again)


def chosen_limits(name: str | None, folder: Path | None, *, again: bool) -> Limits:
    """The limits that the flags ask for; a file is read at once."""
    from deltaloom.runtime.device_profile import named_profile

    return Limits(None if name is None else named_profile(name), folder, again)


def predicted_roofline(settings: Settings, step: "Step", limits: Limits) -> "Roofline":
    """The roofline of a model from its config.json alone; of one rank, if it is divided."""
    from deltaloom.passes.driver import Driver
    from deltaloom.runtime.roofline import predict
    from deltaloom.runtime.subject import read_subject

    subject = read_subject(settings.value("model", "model"), settings.value("model", "hf_overrides"), settings.compile_config())
    driver = Driver(subject.graphs.main, subject.context, planned=(step.variant,), plan=subject.plan)
    return predict(driver.program(step.variant).graph, step, limits.profile(subject.context))


def measured_roofline(settings: Settings, step: "Step", limits: Limits, repetitions: int | None) -> "Roofline":
    """The roofline of a model with its weights, and what it takes."""
    from deltaloom.runtime.load import load
    from deltaloom.runtime.roofline import measure

    options = {key: settings.value("model", key) for key in ("max_model_len", "hf_overrides")}
    model = load(settings.value("model", "model"), config=settings.compile_config(), **options)
    return measure(model, step, limits.profile(model.ctx), repetitions=repetitions)


def write_plot(path: Path, found: "Roofline") -> None:
    """The plot as a file; ``ConfigError`` where it cannot be written."""
    try:
        path.write_text(plot(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the plot cannot be written to {path}: {error.strerror}; choose another file (--svg)") from None


def as_object(found: "Roofline") -> dict[str, Any]:
    """The roofline as JSON; times in seconds."""
    rows = [
        {
            **{name: getattr(row, name) for name in ROW},
            "flops": row.work.flops,
            "bytes": row.work.bytes,
            "floor": row.floor,
        }
        for row in found.rows
    ]
    profile = vars(found.profile) | {"flops": dict(found.profile.flops)}
    total: dict[str, Any] = {"flops": found.work.flops, "bytes": found.work.bytes, "floor": found.floor, "layers": found.layers}
    total |= {"kernels": found.kernels, "dispatch": found.dispatch, "observed": found.observed, "seconds": found.seconds}
    return {"step": vars(found.step), "profile": profile, "rows": rows, "total": total}


def report(found: "Roofline") -> str:
    """The roofline as text."""
    parts = [columns(list(facts(found).items()))]
    for name in found.bodies:
        rows = found.body(name)
        calls = f", {rows[0].calls} times" if rows[0].calls > 1 else ""
        parts.append(f"{name}{calls}\n{columns([header(found), *(cells(row, found) for row in rows)], indent='  ')}")
    return "\n\n".join(parts)


def facts(found: "Roofline") -> dict[str, str]:
    """What stands above the tables."""
    step, work = found.step, found.work
    tokens = "1 token" if step.tokens == 1 else f"{step.tokens:,} tokens"
    sequences = "1 sequence" if step.batch == 1 else f"{step.batch:,} sequences"
    lines = {
        "step": f"{step.kind} of {tokens} after {step.context:,}, {sequences}",
        "device": device_line(found),
        "work": f"{quantity(work.flops, 'FLOP')}, {quantity(work.bytes, 'B')}",
        "at least": duration(found.floor),
    }
    starts = f"{duration(found.dispatch)} to start {found.kernels:,} kernels"
    if found.layers:
        starts += f", {duration(found.dispatch / found.layers)} a layer"
    if found.seconds is None or found.observed is None:
        return lines | {"dispatch": starts}
    lines["takes"] = f"{duration(found.seconds)}, {found.seconds / found.floor:.2f} times that"
    if found.layers:
        lines["takes"] += f", {duration(found.seconds / found.layers)} a layer"
    lines["kernels"] = f"{duration(found.observed)}, run node by node"
    return lines | {"dispatch": starts}


def device_line(found: "Roofline") -> str:
    """What of the profile the rows need, in one line."""
    profile = found.profile
    speeds = [f"{dtype} {quantity(profile.flops[dtype], 'FLOP/s')}" for dtype in dict.fromkeys(row.dtype for row in found.rows)]
    limits = ", ".join([quantity(profile.bandwidth, "B/s"), *speeds, f"{duration(profile.dispatch)} a kernel"])
    return f"{profile.name}: {limits} ({profile.source})"


def header(found: "Roofline") -> list[str]:
    measured = ["takes", "ratio", "share"] if found.seconds is not None else []
    return ["op", "kernel", "FLOP", "bytes", "FLOP/byte", "limit", "at least", *measured]


def cells(row: "Row", found: "Roofline") -> list[str]:
    """A line of a table: of all calls of the body together."""
    shown = [
        f"{len(row.nodes)} x {row.op}",
        row.kernel,
        amount(row.work.flops),
        amount(row.work.bytes),
        f"{row.work.intensity:.2f}",
        row.bound,
        duration(row.floor),
    ]
    if found.observed is None or row.seconds is None:
        return shown
    share = row.seconds / found.observed if found.observed else 0.0
    ratio = "-" if row.ratio is None else f"{row.ratio:,.0f}" if row.ratio >= 100 else f"{row.ratio:.2f}"
    return [*shown, duration(row.seconds), ratio, f"{share:.1%}"]


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
