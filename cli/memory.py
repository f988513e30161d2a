"""``deltaloom memory``: what weights, states and working memory take, planned and, with --measure, as they really are."""

from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.output import fitted, print_json
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.passes.config import CompileConfig
    from deltaloom.runtime.footprint import Footprint, StoredDType, Working
    from deltaloom.runtime.resident import Resident
    from deltaloom.runtime.subject import Subject

CONTEXT = 4096
"""Tokens of a sequence unless --context says otherwise."""


def memory(
    ctx: typer.Context,
    model: options.Looked = None,
    context: Annotated[
        int | None, typer.Option("--context", help=f"Tokens of each sequence; {CONTEXT}, or as many as the model takes.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences that run together.")] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Load the model, run it, and show what it took.")] = False,
    buffers: Annotated[bool, typer.Option("--buffers", help="List the buffers of each plan and how long each is used.")] = False,
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
    """Show what a model takes of memory for a context and a batch; reads no weights unless --measure."""
    settings = Settings(ctx.params, config)
    compiled_as = settings.compile_config()
    name = settings.value("model", "model")
    alone = name.endswith(".json")
    require(not (measure and alone), f"{name} is a config.json without weights; --measure needs a checkpoint folder", ConfigError)
    require(not (measure and compiled_as.mesh), "--measure and --mesh exclude each other: one process runs no rank", ConfigError)
    planned = planned_memory(settings, compiled_as, batch, context)
    taken = measured_memory(settings, compiled_as, batch, planned.context) if measure else None
    if as_json:
        print_json("memory", as_object(planned, taken))
        return
    parts = [report(planned, taken, compiled_as.prefill_chunk)]
    parts += [buffer_table(one) for one in planned.working if buffers and one.buffers]
    print(fitted("\n\n".join(parts)))


def planned_memory(settings: Settings, config: "CompileConfig", batch: int, context: int | None) -> "Footprint":
    """The memory of a model's two usual programs, from types alone."""
    from deltaloom.runtime.footprint import footprint
    from deltaloom.runtime.subject import read_subject

    subject = read_subject(settings.value("model", "model"), settings.value("model", "hf_overrides"), config)
    compiled = subject.compiled()
    programs = {"prefill": compiled.program("prefill"), "decode": compiled.program("decode")}
    home, ranks = subject.context.backends[0], prod(config.mesh.values())
    stored = stored_dtypes(subject, settings.value("model", "model"))
    if context is None:
        most = settings.value("model", "max_model_len") or subject.shape.max_position_embeddings
        context = min(CONTEXT, most - 1)
    return footprint(programs, home, batch=batch, context=context, tokens=config.prefill_chunk, stored=stored, ranks=ranks)


def stored_dtypes(subject: "Subject", name: str) -> "StoredDType | None":
    """The dtypes of a checkpoint's tensors by name, from its headers; None for a mesh, whose ranks cut tensors, and where there are
    no tensors."""
    from deltaloom.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

    found = not name.endswith(".json") and any((subject.folder / file).exists() for file in (INDEX_FILE, SINGLE_FILE))
    if not found or subject.plan:
        return None
    with Checkpoint.open(subject.folder) as checkpoint:
        known = {tensor: checkpoint.info(tensor).dtype for tensor in checkpoint.names()}
    return known.__getitem__


def measured_memory(settings: Settings, config: "CompileConfig", batch: int, context: int) -> "Resident":
    """What the model takes when it is loaded and run."""
    from deltaloom.runtime.load import load
    from deltaloom.runtime.resident import measured

    options = {key: settings.value("model", key) for key in ("max_model_len", "hf_overrides")}
    return measured(lambda: load(settings.value("model", "model"), config=config, **options), batch=batch, context=context)


def as_object(planned: "Footprint", taken: "Resident | None") -> dict[str, Any]:
    """The report as JSON; sizes in bytes."""
    totals = {"filled": planned.filled, "states": planned.states, "total": planned.total}
    return {"planned": asdict(planned) | totals, "measured": None if taken is None else asdict(taken) | {"over": taken.over}}


def report(planned: "Footprint", taken: "Resident | None", chunk: int) -> str:
    """The report as text."""
    spare = f"room for {planned.room:,} tokens at {planned.token:,} bytes" if planned.token else "none"
    rows = [
        ["", "planned", *(["measured"] if taken else []), ""],
        ["weights, made at load", size(planned.held), *([size(taken.held)] if taken else []), ""],
        ["weights, mapped from files", size(planned.mapped), *([size(taken.mapped)] if taken else []), "counted with the files"],
        ["states of fixed size", size(planned.fixed), *([""] if taken else []), ""],
        ["keys and values", size(planned.room * planned.token), *([""] if taken else []), spare],
        ["states together", size(planned.states), *([size(taken.states)] if taken else []), ""],
    ]
    for one in planned.working:
        actual = [size(taken.arenas) if one.planned else ""] if taken else []
        rows.append([f"{one.title}, {'arena' if one.planned else 'values'}", size(one.nbytes), *actual, note(one)])
    rows.append(["together", size(planned.total), *([""] if taken else []), "without mapped files"])
    sequences = "1 sequence" if planned.batch == 1 else f"{planned.batch:,} sequences"
    title = f"{sequences} of {planned.context:,} tokens, prefill in steps of {chunk:,}"
    title += f", each of {planned.ranks} ranks" if planned.ranks > 1 else ""
    return "\n".join([title, columns(rows, indent="  "), *(resident_lines(taken) if taken else [])])


def note(one: "Working") -> str:
    """What is known of a program's working memory."""
    if not one.planned:
        return f"not planned, since kernels allocate; all values together are {size(one.unshared)}"
    return (
        f"{len(one.buffers):,} buffers, checked; {size(one.unshared)} without reuse, scratch of a kernel up to {size(one.scratch)}"
    )


def resident_lines(taken: "Resident") -> list[str]:
    """What the system says of this process."""
    if taken.over is None:
        return ["the system does not tell the anonymous memory of a process"]
    grown, most = size(taken.loaded - taken.start), size(taken.most - taken.start)
    return [
        f"anonymous memory: {size(taken.start)} before loading; loading took {grown}, compiled programs included",
        f"at most {most} over the start, {taken.over:+.1%} of weights and states",
    ]


def buffer_table(one: "Working") -> str:
    """The buffers of a plan, one a line; the node numbers between which each is used."""
    lines = [["function", "node", "", "from byte", "bytes", "used by nodes"]]
    for held in one.buffers:
        used = f"{held.first} to {held.last}" if held.first != held.last else str(held.first)
        lines.append([held.function, held.node, held.kind, f"{held.offset:,}", f"{held.nbytes:,}", used])
    return f"{one.title}\n{columns(lines, indent='  ')}"


def size(nbytes: int) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if abs(nbytes) >= 1000**power:
            return f"{nbytes / 1000**power:.2f} {unit}"
    return f"{nbytes} B"
