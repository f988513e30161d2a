"""``deltaloom inspect``: what a model is and which kernel runs each of its ops, without reading a weight."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.ledger import ledger_object, ledger_text
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.graph.ir import Graph
    from deltaloom.models.build import ModelGraphs
    from deltaloom.models.config import ModelConfig
    from deltaloom.passes.config import CompileConfig
    from deltaloom.passes.pipeline import Context
    from deltaloom.passes.shard.plan import Plan
    from deltaloom.runtime.compile import CompiledModel, KernelRow

OUTPUTS = ("last_logits",)


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model's files and shape, its graphs, and what they are compiled with."""

    folder: Path
    shape: "ModelConfig"
    graphs: "ModelGraphs"
    context: "Context"
    plan: "Plan"

    def compiled(self) -> "CompiledModel":
        """The programs of the main model that give the last logits."""
        from deltaloom.passes.driver import Driver, plain_variants
        from deltaloom.runtime.compile import CompiledModel

        graph, variants = self.graphs.main, plain_variants(OUTPUTS)
        return CompiledModel(graph, Driver(graph, self.context, planned=variants, plan=self.plan), outputs=OUTPUTS)


def inspect(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, its config.json alone, or bundled name; tiny-next if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the layer graph as text.")] = False,
    source: Annotated[str | None, typer.Option("--source", help="Print the emitted program: prefill or decode.")] = None,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Print what each pass did: nodes before and after, time, rewrites.")
    ] = False,
    explain_miss: Annotated[
        bool, typer.Option("--explain-miss", help="Print the key of the compile cache, and in what the nearest entry differs.")
    ] = False,
    config: options.RunFile = None,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    quantise: options.Quantise = None,
    keep_quantized: options.KeepQuantized = None,
    mesh: options.Mesh = None,
    skip: options.Skip = None,
    fuel: options.Fuel = None,
    cache: options.Cache = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show a model's shape, its layers, and which kernel each op gets and why others refused. Reads no weights."""
    given = (("--json", as_json and not ledger), ("--graph", graph), ("--source", source), ("--ledger", ledger))
    chosen = [name for name, value in (*given, ("--explain-miss", explain_miss)) if value]
    require(len(chosen) < 2, f"{' and '.join(chosen)} exclude each other; give one of them", ConfigError)
    require(source in (None, "prefill", "decode"), f"--source is {source!r}, expected prefill or decode", ConfigError)
    from deltaloom.cli.settings import Settings

    settings = Settings(ctx.params, config)
    compile_config = settings.compile_config()
    subject = read_subject(settings.value("model", "model"), settings.value("model", "hf_overrides"), compile_config)
    if graph:
        print("\n".join(str(one) for one in (subject.graphs.main, subject.graphs.mtp) if one), end="")
    elif explain_miss:
        print("\n".join(explained_miss(subject, compile_config)))
    elif source:
        print(subject.compiled().source("decode" if source == "decode" else "prefill"))
    elif ledger:
        rows = subject.compiled().ledger
        print(json.dumps(ledger_object(rows)) if as_json else ledger_text(rows))
    else:
        compiled = subject.compiled()
        programs = {"prefill": compiled.explain("prefill"), "decode": compiled.explain("decode")}
        facts = model_facts(subject)
        print(
            json.dumps(as_object(facts, subject.graphs, programs)) if as_json else report(facts, subject.graphs, programs, compiled)
        )


def read_subject(model: str, hf_overrides: dict[str, object], config: "CompileConfig") -> Subject:
    """What a model is, from its config.json and the headers of its weight files, where it has any."""
    from deltaloom.models.build import build_graph
    from deltaloom.models.bundled import model_folder
    from deltaloom.models.config import read_config
    from deltaloom.models.plans import shard_pass
    from deltaloom.runtime.compile import context

    alone = model.endswith(".json")
    folder = Path(model) if alone else model_folder(model)
    shape = read_config(folder, hf_overrides)
    compile_context = context(config, shape)
    element = compile_context.backends[0].compute_dtype(compile_context.config.dtype)
    graphs = build_graph(shape, dtype=element, names=None if alone else tensor_names(folder))
    plan = shard_pass(shape, config.mesh).plan if config.mesh else ()
    return Subject(folder, shape, graphs, compile_context, plan)


def explained_miss(subject: Subject, config: "CompileConfig") -> list[str]:
    """Whether the cache has the programs, and why not, as lines; the default folder's where the configuration has none."""
    from dataclasses import replace

    from deltaloom.passes.cache import CompileCache, cache_of
    from deltaloom.passes.config import CACHE_DEFAULT, CACHE_OFF
    from deltaloom.passes.driver import driver_key, plain_variants
    from deltaloom.passes.stored import SHARED

    cache: CompileCache | None = cache_of(
        replace(config, cache=CACHE_DEFAULT if config.cache == CACHE_OFF else config.cache, dump=None)
    )
    assert cache is not None
    key = driver_key(subject.graphs.main, subject.context, planned=plain_variants(OUTPUTS), plan=subject.plan)
    return cache.explain(key, SHARED)


def tensor_names(folder: Path) -> list[str] | None:
    """The names in the headers of the checkpoint's files, or None for a folder that has a config.json only."""
    from deltaloom.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

    if not any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return None
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.names()


def model_facts(subject: Subject) -> dict[str, Any]:
    """What the first part of the report says, by name; sizes in elements and tokens."""
    from deltaloom.models.inventory import parameter_count

    shape, graphs = subject.shape, subject.graphs
    experts = f"{shape.num_experts_per_tok} of {shape.num_experts}" if shape.num_experts else "none"
    main = parameter_count(graphs.main)
    with_head = parameter_count(graphs.main, graphs.mtp)
    return {
        "folder": str(subject.folder),
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
        "computes in": subject.context.config.dtype,
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


def as_object(facts: dict[str, Any], graphs: "ModelGraphs", programs: dict[str, list["KernelRow"]]) -> dict[str, Any]:
    """The report as JSON."""
    rows = {
        title: [
            {"body": r.body, "op": r.op, "count": len(r.nodes), "kernel": r.kernel, "refusals": list(map(str, r.refusals))}
            for r in body
        ]
        for title, body in programs.items()
    }
    named = {name.replace(" ", "_").lower(): value for name, value in facts.items()}
    return named | {"layer_regions": layer_names(graphs.main), "programs": rows}


def report(facts: dict[str, Any], graphs: "ModelGraphs", programs: dict[str, list["KernelRow"]], compiled: "CompiledModel") -> str:
    """The report as text."""
    shown = [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in facts.items()]
    lines = [columns(shown)]
    calls = Counter(layer_names(graphs.main))
    for title, rows in programs.items():
        lines += ["", f"{title}:"]
        for body in dict.fromkeys(row.body for row in rows):
            lines.append(f"  {body}" + (f", {calls[body]} times" if body in calls else ""))
            lines.append(columns([(f"{len(r.nodes)} x {r.op}", r.kernel) for r in rows if r.body == body], indent="    "))
        refusals = dict.fromkeys((row.op, str(refusal)) for row in rows for refusal in row.refusals)
        if refusals:
            lines += ["  refused", columns(list(refusals), indent="    ")]
    conflicts = [str(conflict) for conflict in compiled.driver.conflicts]
    return "\n".join([*lines, *(["", "weight layouts that kernels disagreed on:", *conflicts] if conflicts else [])])
