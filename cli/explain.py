"""``deltaloom explain``: why programs are as they are: who runs each node, who refused, what rules did and what they nearly did."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.inspect import look_at
from deltaloom.cli.node import node_object, node_text
from deltaloom.cli.output import listed, print_json
from deltaloom.cli.settings import Settings
from deltaloom.cli.table import columns
from deltaloom.graph.errors import ConfigError, require

if TYPE_CHECKING:
    from deltaloom.runtime.compilations import Compilations
    from deltaloom.runtime.compile import CompiledModel
    from deltaloom.runtime.explanation import Explanation, KernelRow, ProgramReasons
    from deltaloom.runtime.node_facts import NodeFacts


def explain(
    ctx: typer.Context,
    model: options.Looked = None,
    kind: Annotated[
        str | None, typer.Option("--program", help="prefill, decode, mixed, serving_decode or verify; the first two.")
    ] = None,
    node: Annotated[str | None, typer.Option("--node", help="About one node only.", metavar="ID")] = None,
    op: Annotated[str | None, typer.Option("--op", help="About the nodes of one op only.", metavar="NAME")] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="Show what fused nodes stand for.")] = False,
    count: Annotated[
        bool,
        typer.Option("--count", help="Load the model, run it, and count compilations and graph breaks."),
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
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show which kernel runs each node and why others refused, what rules did and nearly did. Reads no weights."""
    from deltaloom.runtime.compile import KINDS, PROGRAMS

    require(not (node and op), "--node and --op exclude each other; give one of them", ConfigError)
    require(kind is None or kind in PROGRAMS, f"there is no program '{kind}'; there is {', '.join(PROGRAMS)}", ConfigError)
    settings = Settings(ctx.params, config)
    compiled = look_at(settings).compiled()
    programs = tuple(name for name in PROGRAMS if name == kind) or KINDS
    found = compiled.explanation(programs)
    facts = None
    if op is not None:
        require_op(op, found)
        found = found.about(op=op)
    if node is not None:
        facts = compiled.node(node, programs[-1])
        found = found.about(nodes=(facts.node.name, *facts.node.origins), body=facts.body)
    folded = list(unfolded_nodes(compiled, found)) if unfold else []
    counts = counted(settings) if count else {}
    if as_json:
        print_json("explain", {**as_object(found, facts, folded), "counted": {name: vars(one) for name, one in counts.items()}})
    else:
        parts = [*report(found, facts, programs[-1], folded, whole=node is None and op is None), *count_texts(found, counts)]
        print("\n\n".join(parts))


def counted(settings: Settings) -> "dict[str, Compilations]":
    """What the backends that compile did in a run of the model that the settings name."""
    from deltaloom.runtime.compilations import count_compilations
    from deltaloom.runtime.load import load

    name, overrides = settings.value("model", "model"), settings.value("model", "hf_overrides")
    require(not name.endswith(".json"), f"{name} is a config.json without weights; --count needs a checkpoint folder", ConfigError)
    return count_compilations(load(name, config=settings.compile_config(), hf_overrides=overrides))


def count_texts(found: "Explanation", counts: "dict[str, Compilations]") -> Iterator[str]:
    """The budget of backends that compile, and what was counted."""
    for backend, budget in found.budgets.items():
        each = f"at most {budget} times each, for one sequence or more and one token or more"
        yield f"{backend} compiles each function as one graph, and fails where it cannot: no graph breaks;\n{each}"
    for backend, one in counts.items():
        times = one.compilations.values()
        most = f", {max(times)} times at most" if times else ""
        of = f"{sum(times)} compilations of {len(times)} functions{most}"
        yield f"counted on {backend}: {of}; graph breaks: {one.graph_breaks}"


def require_op(op: str, found: "Explanation") -> None:
    """``ConfigError`` unless some node runs that op."""
    import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
    from deltaloom.graph.registry import ops

    ops.get(op)
    used = sorted({row.op for one in found.programs.values() for row in one.kernels})
    used += sorted({row.rule for one in found.programs.values() for row in one.taken_apart})
    hint = "it was fused into another (`--unfold` shows what fused ops stand for), or the model has none"
    require(op in used, f"no node of these programs runs '{op}': {hint}; there is {', '.join(used)}", ConfigError)


def unfolded_nodes(compiled: "CompiledModel", found: "Explanation") -> Iterator[tuple[str, str, str]]:
    """Program and body, node, and the parts as text, of each fused op once for each body."""
    from deltaloom.graph.text import node_line
    from deltaloom.runtime.explanation import unfolded

    for title, one in found.programs.items():
        graph = compiled.graph(title)
        for row in one.kernels:
            body = graph if row.body == graph.name else graph.regions[row.body]
            for name in row.nodes:
                node = body.producers[name]
                if (parts := unfolded(node)) is not None:
                    lines = [f"%{value.name} is {given}" for value, given in zip(parts.inputs, node.inputs, strict=True)]
                    lines += [node_line(part, sources=False) for part in parts.nodes]
                    lines += [f"%{node.outputs[int(name)].name} is {value}" for name, value in parts.outputs]
                    yield f"{title} {row.body}", f"%{name} = {node.op.name}", "\n".join(lines)


def report(
    found: "Explanation", facts: "NodeFacts | None", stage: str, folded: Sequence[tuple[str, str, str]], *, whole: bool
) -> Iterator[str]:
    """The answer as paragraphs."""
    if facts is not None:
        yield node_text(facts, stage)
    else:
        for title, one in found.programs.items():
            yield f"{title}:\n{program_text(one)}"
    yield from rule_texts(found)
    if whole and found.conflicts:
        yield "weight layouts that kernels disagreed on:\n" + "\n".join(f"  {conflict}" for conflict in found.conflicts)
    for where, node, text in folded:
        yield f"{node} in {where} stands for\n" + "\n".join(f"  {line}" for line in text.splitlines())


def program_text(one: "ProgramReasons") -> str:
    """Kernels by body, refusals, transfers and what is compiled."""
    lines: list[str] = []
    for body in dict.fromkeys(row.body for row in one.kernels):
        lines.append(f"  {body}" + (f", {one.calls[body]} times" if one.calls[body] > 1 else ""))
        rows = [(f"{len(row.nodes)} x {row.op}", row.kernel, listed(row.nodes, 2)) for row in one.kernels if row.body == body]
        lines.append(columns(rows, indent="    "))
    refusals = dict.fromkeys((row.op, str(refusal)) for row in one.kernels for refusal in row.refusals)
    lines += ["  refused", columns(list(refusals), indent="    ")] if refusals else []
    if one.taken_apart:
        apart = [(rule.rule, rule.graph, rule.reason) for rule in one.taken_apart]
        lines += ["  taken apart, since nobody runs them whole", columns(apart, indent="    ")]
    lines += [f"  copies between backends: {listed(one.transfers)}"] if one.transfers else []
    for backend, functions in one.compiled.items():
        lines.append(f"  {backend} compiles {len(functions)} functions: {listed(functions)}")
    return "\n".join(lines)


def rule_texts(found: "Explanation") -> Iterator[str]:
    """Rules that applied, and rules that did not and why."""
    hits = [(rule.rule, rule.graph, f"{len(rule.nodes)} x", listed(rule.nodes, 2)) for rule in found.rules if rule.kind == "hit"]
    others = [(rule.rule, rule.graph, rule.kind, rule.reason) for rule in found.rules if rule.kind != "hit"]
    if hits:
        yield "rules that applied:\n" + columns(hits, indent="  ")
    if others:
        yield "rules that did not:\n" + columns(list(dict.fromkeys(others)), indent="  ")


def as_object(found: "Explanation", facts: "NodeFacts | None", folded: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """The answer as JSON."""
    programs = {
        title: {
            "kernels": [row_object(row, one) for row in one.kernels],
            "taken_apart": [{**asdict(rule), "nodes": list(rule.nodes)} for rule in one.taken_apart],
            "transfers": list(one.transfers),
            "compiled": {backend: list(functions) for backend, functions in one.compiled.items()},
        }
        for title, one in found.programs.items()
    }
    return {
        "programs": programs,
        "rules": [{**asdict(rule), "nodes": list(rule.nodes)} for rule in found.rules],
        "compile_budgets": dict(found.budgets),
        "layout_conflicts": [asdict(conflict) for conflict in found.conflicts],
        "unfolded": [{"where": where, "node": node, "parts": text.splitlines()} for where, node, text in folded],
        "node": None if facts is None else node_object(facts),
    }


def row_object(row: "KernelRow", one: "ProgramReasons") -> dict[str, Any]:
    refusals = [vars(refusal) for refusal in row.refusals]
    facts = {"body": row.body, "calls": one.calls[row.body], "op": row.op, "nodes": list(row.nodes)}
    return {**facts, "kernel": row.kernel, "refusals": refusals}
