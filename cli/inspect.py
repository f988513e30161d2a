"""``deltaloom inspect``: what a model is and which kernel runs each of its ops, without reading a weight."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.graph.ir import Graph
    from deltaloom.models.build import ModelGraphs
    from deltaloom.models.config import ModelConfig
    from deltaloom.passes.driver import Driver
    from deltaloom.passes.emit import Program

OUTPUTS = ("last_logits",)


@dataclass(frozen=True)
class KernelRow:
    """Nodes of one body of a program that run the same op on the same kernel, refused by the same others."""

    body: str
    op: str
    count: int
    kernel: str
    refusals: tuple[str, ...]


def inspect(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or bundled name; tiny-next if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the layer graph as text.")] = False,
    source: Annotated[str | None, typer.Option("--source", help="Print the emitted program: prefill or decode.")] = None,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show a model's shape, its layers, and which kernel each op gets and why others refused. Reads no weights."""
    chosen = [name for name, given in (("--json", as_json), ("--graph", graph), ("--source", source)) if given]
    require(len(chosen) < 2, f"{' and '.join(chosen)} exclude each other; give one of them", ConfigError)
    require(source in (None, "prefill", "decode"), f"--source is {source!r}, expected prefill or decode", ConfigError)
    from deltaloom.cli.settings import Settings
    from deltaloom.models.build import build_graph
    from deltaloom.models.bundled import model_folder
    from deltaloom.models.config import read_config
    from deltaloom.runtime.load import context

    settings = Settings(ctx.params, config)
    folder = model_folder(settings.value("model", "model"))
    shape = read_config(folder, settings.value("model", "hf_overrides"))
    compile_context = context(settings.compile_config(), shape)
    element = compile_context.backends[0].compute_dtype(compile_context.config.dtype)
    graphs = build_graph(shape, dtype=element, names=tensor_names(folder))
    if graph:
        print("\n".join(str(one) for one in (graphs.main, graphs.mtp) if one), end="")
        return
    from deltaloom.passes.driver import Driver, Variant

    prefill, decode = Variant(False, False, OUTPUTS), Variant(True, False, OUTPUTS)
    driver = Driver(graphs.main, compile_context, planned=(prefill, decode))
    if source:
        print(driver.program(decode if source == "decode" else prefill).source)
        return
    programs = {"prefill": kernel_rows(driver.program(prefill)), "decode": kernel_rows(driver.program(decode))}
    facts = model_facts(shape, graphs, folder, compile_context.config.dtype)
    print(json.dumps(as_object(facts, graphs, programs)) if as_json else report(facts, graphs, programs, driver))


def tensor_names(folder: Path) -> list[str] | None:
    """The names in the headers of the checkpoint's files, or None for a folder that has a config.json only."""
    from deltaloom.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

    if not any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return None
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.names()


def model_facts(shape: "ModelConfig", graphs: "ModelGraphs", folder: Path, dtype: str) -> dict[str, Any]:
    """What the first part of the report says, by name; sizes in elements and tokens."""
    from deltaloom.models.inventory import parameter_count

    experts = f"{shape.num_experts_per_tok} of {shape.num_experts}" if shape.num_experts else "none"
    main = parameter_count(graphs.main)
    with_head = parameter_count(graphs.main, graphs.mtp)
    return {
        "folder": str(folder),
        "model type": shape.model_type,
        "layers": fold_layers(layer_names(graphs.main)),
        "hidden size": shape.hidden_size,
        "attention heads": f"{shape.num_attention_heads} query, {shape.num_key_value_heads} key/value, of {shape.head_dim}",
        "experts a token": experts,
        "vocabulary": shape.vocab_size,
        "context": shape.max_position_embeddings,
        "parameters": main,
        "parameters of the MTP head": with_head - main,
        "stored as": shape.dtype,
        "computes in": dtype,
    }


def layer_names(graph: "Graph") -> list[str]:
    """The region of each layer, in order."""
    return [instance.graph.name for instance in graph.instances() if instance.prefix]


def fold_layers(names: Sequence[str]) -> str:
    """``2 x (3 x linear_layer, attention_layer)`` for eight layers of that pattern."""
    period = next(size for size in range(1, len(names) + 1) if list(names) == (list(names[:size]) * len(names))[: len(names)])
    times = len(names) // period if len(names) % period == 0 else 1
    runs: list[list[Any]] = []
    for name in names if times == 1 else names[:period]:
        if runs and runs[-1][1] == name:
            runs[-1][0] += 1
        else:
            runs.append([1, name])
    inner = ", ".join(f"{count} x {name}" if count > 1 else name for count, name in runs)
    if times == 1:
        return inner
    return f"{times} x ({inner})" if len(runs) > 1 else f"{times * runs[0][0]} x {runs[0][1]}"


def kernel_rows(program: "Program") -> list[KernelRow]:
    """The kernels of every body of a program; the bodies by first use, the ops by name."""
    rows: list[KernelRow] = []
    bodies = {instance.graph.name: instance.graph for instance in program.graph.instances()}
    for name, body in bodies.items():
        placed = [(node.op.name, node.placement) for node in body.nodes if node.placement is not None]
        kinds = Counter(
            (op, place.kernel, tuple(f"{refusal.kernel}: {refusal.reason}" for refusal in place.refusals)) for op, place in placed
        )
        rows += [KernelRow(name, op, count, kernel, refusals) for (op, kernel, refusals), count in sorted(kinds.items())]
    return rows


def as_object(facts: dict[str, Any], graphs: "ModelGraphs", programs: dict[str, list[KernelRow]]) -> dict[str, Any]:
    """The report as JSON."""
    rows = {title: [vars(row) | {"refusals": list(row.refusals)} for row in body] for title, body in programs.items()}
    named = {name.replace(" ", "_").lower(): value for name, value in facts.items()}
    return named | {"layer_regions": layer_names(graphs.main), "programs": rows}


def report(facts: dict[str, Any], graphs: "ModelGraphs", programs: dict[str, list[KernelRow]], driver: "Driver") -> str:
    """The report as text."""
    shown = [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in facts.items()]
    lines = [columns(shown)]
    calls = Counter(layer_names(graphs.main))
    for title, rows in programs.items():
        lines += ["", f"{title}:"]
        for body in dict.fromkeys(row.body for row in rows):
            lines.append(f"  {body}" + (f", {calls[body]} times" if body in calls else ""))
            lines.append(columns([(f"{r.count} x {r.op}", r.kernel) for r in rows if r.body == body], indent="    "))
        refusals = dict.fromkeys((row.op, refusal) for row in rows for refusal in row.refusals)
        if refusals:
            lines += ["  refused", columns(list(refusals), indent="    ")]
    conflicts = [str(conflict) for conflict in driver.conflicts]
    return "\n".join([*lines, *(["", "weight layouts that kernels disagreed on:", *conflicts] if conflicts else [])])
