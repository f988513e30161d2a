"""``deltaloom inspect``: what a model is and does on one screen, any stage of its graph, and any node; no weight is read."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.ledger import ledger_object, ledger_summary, ledger_text
from deltaloom.cli.node import node_object, node_text
from deltaloom.cli.output import amount, fitted, print_json, quantity
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.passes.config import CompileConfig
    from deltaloom.runtime.overview import Overview, Part
    from deltaloom.runtime.subject import Subject


def inspect(
    ctx: typer.Context,
    model: options.Looked = None,
    context: Annotated[int | None, typer.Option("--context", help="Tokens that a decode step finds; 4096.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of a decode step.")] = 1,
    node: Annotated[str | None, typer.Option("--node", help="One node of decode, or of --after, in full.", metavar="ID")] = None,
    after: Annotated[
        str | None, typer.Option("--after", help="The graph at a stage: given, PASS, decode, decode.PASS, …", metavar="STAGE")
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph as text: as it was given, or --after.")] = False,
    dot: Annotated[bool, typer.Option("--dot", help="Print the graph of decode, or of --after, for Graphviz.")] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Print what each pass did: nodes before and after, time, rewrites.")
    ] = False,
    explain_miss: Annotated[
        bool, typer.Option("--explain-miss", help="Print the key of the compile cache, and in what the nearest entry differs.")
    ] = False,
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
    cache: options.Cache = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show what a model is, part by part, and what the compiler makes of it. Reads no weights."""
    views = (
        ("--node", node is not None),
        ("--graph", graph),
        ("--dot", dot),
        ("--ledger", ledger),
        ("--explain-miss", explain_miss),
    )
    chosen = [name for name, value in views if value]
    require(len(chosen) < 2, f"{' and '.join(chosen)} exclude each other; give one of them", ConfigError)
    require(not (as_json and (dot or explain_miss)), f"--json and {''.join(chosen)} exclude each other", ConfigError)
    require(after is None or not (ledger or explain_miss), f"--after and {''.join(chosen)} exclude each other", ConfigError)
    settings = Settings(ctx.params, config)
    compile_config = settings.compile_config()
    subject, stage = look_at(settings), "decode" if after is None else after
    if explain_miss:
        print("\n".join(explained_miss(subject, compile_config)))
    elif node is not None:
        facts = subject.compiled().node(node, stage)
        print_json("node", node_object(facts)) if as_json else print(node_text(facts, stage))
    elif dot:
        print(dot_text(subject, stage), end="")
    elif graph or after is not None:
        print_graphs(subject, "given" if after is None else after, as_json=as_json)
    elif ledger:
        rows = subject.compiled().ledger
        print_json("ledger", {"parts": ledger_object(rows)}) if as_json else print(ledger_text(rows))
    else:
        print_overview(subject, batch, context, as_json=as_json)


def look_at(settings: Settings) -> "Subject":
    """The model that the settings name."""
    from deltaloom.runtime.subject import read_subject

    name, overrides = settings.value("model", "model"), settings.value("model", "hf_overrides")
    return read_subject(name, overrides, settings.compile_config())


def explained_miss(subject: "Subject", config: "CompileConfig") -> list[str]:
    """Whether the cache has the programs, and why not, as lines; the default folder's where the configuration has none."""
    from deltaloom.passes.cache import CompileCache, cache_of
    from deltaloom.passes.config import CACHE_DEFAULT, CACHE_OFF
    from deltaloom.passes.driver import driver_key, plain_variants
    from deltaloom.passes.stored import SHARED
    from deltaloom.runtime.subject import OUTPUTS

    cache: CompileCache | None = cache_of(
        replace(config, cache=CACHE_DEFAULT if config.cache == CACHE_OFF else config.cache, dump=None)
    )
    assert cache is not None
    key = driver_key(subject.graphs.main, subject.context, planned=plain_variants(OUTPUTS), plan=subject.plan)
    return cache.explain(key, SHARED)


def dot_text(subject: "Subject", stage: str) -> str:
    """The graph at a stage for Graphviz."""
    from deltaloom.graph.dot import dot

    return dot(subject.compiled().graph(stage))


def print_graphs(subject: "Subject", stage: str, *, as_json: bool) -> None:
    """The graph at a stage; with the one of the MTP head where it is the stage before all passes."""
    from deltaloom.graph.serialize import to_json
    from deltaloom.runtime.stages import GIVEN

    both = (subject.graphs.main, subject.graphs.mtp) if stage == GIVEN else (subject.compiled().graph(stage),)
    graphs = [graph for graph in both if graph is not None]
    if as_json:
        import json

        print_json("graph", {"stage": stage, "graphs": [json.loads(to_json(graph)) for graph in graphs]})
    else:
        print("\n".join(map(str, graphs)), end="")


def print_overview(subject: "Subject", batch: int, context: int | None, *, as_json: bool) -> None:
    """What a model is, part by part, and the ledger in short."""
    from deltaloom.runtime.overview import CONTEXT, layer_names

    compiled = subject.compiled()
    found = compiled.overview(batch=batch, context=CONTEXT if context is None else context)
    ledger = {title: rows for title, rows in compiled.driver.ledgers.items() if not title.startswith("prefill")}
    if as_json:
        regions = layer_names(subject.graphs.main)
        fields = {
            **model_facts(subject, found),
            **overview_object(found),
            "layer_regions": regions,
            "ledger": ledger_object(ledger),
        }
        print_json("inspect", fields)
    else:
        print(fitted("\n\n".join([header(subject, found), tree(found), ledger_summary(ledger)])))


def model_facts(subject: "Subject", found: "Overview") -> dict[str, Any]:
    """What is said of a model as a whole, by name; sizes in elements and tokens."""
    from deltaloom.models.inventory import parameter_count

    shape, graphs = subject.shape, subject.graphs
    main = parameter_count(graphs.main)
    return {
        "model": str(subject.folder),
        "model_type": shape.model_type,
        "parameters": main,
        "active_parameters": found.active,
        "mtp_parameters": parameter_count(graphs.main, graphs.mtp) - main,
        "num_layers": shape.num_hidden_layers,
        "layers": found.layers,
        "hidden_size": shape.hidden_size,
        "query_heads": shape.num_attention_heads,
        "key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "experts": shape.num_experts or 0,
        "experts_per_token": shape.num_experts_per_tok if shape.num_experts else 0,
        "vocabulary": shape.vocab_size,
        "max_context": shape.max_position_embeddings,
        "stored_dtype": shape.dtype,
        "compute_dtype": subject.context.config.dtype,
        "backends": [backend.name for backend in subject.context.backends],
        "mesh": dict(subject.context.config.mesh),
    }


def overview_object(found: "Overview") -> dict[str, Any]:
    """States and work as JSON: bytes of one sequence's states, work of a decode step of the whole batch."""
    from deltaloom.runtime.overview import STATE_CONTEXTS

    parts = [
        {**vars(part), "backends": list(part.backends), "work": vars(part.work), "intensity": part.work.intensity}
        for part in found.parts
    ]
    lengths = {str(tokens): found.state_bytes(tokens) for tokens in STATE_CONTEXTS}
    return {
        "state": {"fixed_bytes": found.fixed, "bytes_per_token": found.growing, "bytes_at": lengths},
        "step": {"batch": found.batch, "context": found.context, **vars(found.work)},
        "parts": parts,
    }


def header(subject: "Subject", found: "Overview") -> str:
    """The lines above the tree."""
    from deltaloom.runtime.overview import STATE_CONTEXTS

    facts = model_facts(subject, found)
    extra = f"; MTP head {amount(facts['mtp_parameters'])} more" if facts["mtp_parameters"] else ""
    mesh = ", ".join(f"{axis}={count}" for axis, count in facts["mesh"].items())
    rank = " on each rank" if mesh else ""
    experts = f", experts {facts['experts_per_token']} of {facts['experts']}" if facts["experts"] else ""
    heads = f"{facts['query_heads']} query and {facts['key_value_heads']} key/value heads of {facts['head_dim']}"
    lengths = ", ".join(f"{tokens // 1024}k {quantity(found.state_bytes(tokens), 'B')}" for tokens in STATE_CONTEXTS)
    sequences = "1 sequence" if found.batch == 1 else f"{found.batch:,} sequences"
    step = f"{quantity(found.work.flops, 'FLOP')}, {quantity(found.work.bytes, 'B')}"
    rows = [
        (facts["model_type"], facts["model"]),
        ("parameters", f"{facts['parameters']:,}, of which a token uses {facts['active_parameters']:,}{rank}{extra}"),
        ("layers", f"{facts['num_layers']}: {found.layers}"),
        ("sizes", f"hidden {facts['hidden_size']:,}, {heads}{experts}"),
        ("", f"vocabulary {facts['vocabulary']:,}, context {facts['max_context']:,}"),
        ("dtype", f"stored {facts['stored_dtype']}, computes in {facts['compute_dtype']} on {', '.join(facts['backends'])}"),
        ("state", f"{quantity(found.fixed, 'B')} + {found.growing:,} B a token: {lengths} a sequence"),
        ("decode step", f"{sequences} after {found.context:,} tokens: {step}"),
    ]
    rows += [("mesh", f"{mesh}; states, work and the table are of one rank")] if mesh else []
    return columns(rows)


def tree(found: "Overview") -> str:
    """The parts as a table: of all calls together, work for each new token."""
    from deltaloom.runtime.overview import Part

    rows = [["part", "calls", "parameters", "active", "FLOP/token", "bytes/token", "FLOP/byte", "backend"]]
    rows += [part_cells(part, found.batch, found.letters) for part in found.parts]
    backends = tuple(dict.fromkeys(name for part in found.parts for name in part.backends))
    whole = Part("in all", 0, 1, found.parameters, found.active, found.work, backends)
    return columns([*rows, part_cells(whole, found.batch, {})])


def part_cells(part: "Part", batch: int, letters: Mapping[str, str]) -> list[str]:
    letter = f"{letters[part.name]}  " if part.depth == 0 and part.name in letters else ""
    return [
        "     " * part.depth + letter + part.name,
        str(part.calls) if part.calls > 1 and part.depth == 0 else "",
        amount(part.parameters),
        amount(part.active),
        amount(part.work.flops / batch),
        amount(part.work.bytes / batch),
        f"{part.work.intensity:.2f}",
        ", ".join(part.backends),
    ]
