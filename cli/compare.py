"""``deltaloom compare``: run a model in two ways, side by side, and name the first value that parts and why."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.output import listed, print_json
from deltaloom.cli.settings import Settings
from deltaloom.graph.errors import ConfigError, RequestError, require

if TYPE_CHECKING:
    from deltaloom.passes.config import CompileConfig
    from deltaloom.runtime.compare import Comparison, Way

PROMPT = "The quick brown fox jumps over the lazy dog. 2 + 3 = 5; 17 * 4 = 68."
UNFUSED = "unfused"
PARTED = 1


def compare(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or bundled name; tiny-next if not given.")] = None,
    ways: Annotated[
        str,
        typer.Option(
            "--backends",
            help="Two ways by comma: a backend, several by +, `reference` (the definition in float64), `unfused` (the backend "
            "without fusions), or ranks in lock step, `tp=2`.",
            metavar="A,B",
        ),
    ] = "numpy,reference",
    prompt: Annotated[str, typer.Option("--prompt", help="The text that both begin with.")] = PROMPT,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Token ids by comma in place of a text.", metavar="IDS")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Decode steps after the prompt.", min=0)] = 3,
    repro: Annotated[
        Path | None, typer.Option("--repro", help="Write the kernel that is wrong, alone, to this new folder.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: options.RunFile = None,
    dtype: options.DType = None,
    device: options.Device = None,
    threads: options.Threads = None,
    quantise: options.Quantise = None,
    keep_quantized: options.KeepQuantized = None,
    skip: options.Skip = None,
    fuel: options.Fuel = None,
    hf_overrides: options.HfOverrides = None,
) -> None:
    """Show where two ways to run a model part first: a value, a state or a weight, by name, and the kernel, sharding string or pass
    that is to blame. Exits with 1 where something parts."""
    from deltaloom.runtime.compare import compare as run

    settings = Settings(ctx.params, config)
    base, overrides = settings.compile_config(), settings.value("model", "hf_overrides")
    name = settings.value("model", "model")
    titles, (a, b) = two_ways(ways, base)
    found = run(name, a, b, ids=token_ids(name, prompt, tokens), steps=steps, titles=titles, hf_overrides=overrides)
    print_json("compare", _object(found)) if as_json else print(_text(found))
    if repro is not None:
        _write(found, base, repro, as_json)
    if found.finding is not None:
        raise typer.Exit(PARTED)


def two_ways(text: str, base: "CompileConfig") -> tuple[tuple[str, str], tuple["Way", "Way"]]:
    """The ways that ``--backends`` names, as configurations that are otherwise ``base``, and their names."""
    from deltaloom.cli.settings import read_mesh
    from deltaloom.runtime.compare import FUSIONS, REFERENCE

    names = [part.strip() for part in text.split(",")]
    good = len(names) == 2 and all(names)
    require(good, f"--backends is '{text}', expected two ways with a comma between them, as numpy,reference", ConfigError)
    backends = next(
        (tuple(name.split("+")) for name in names if name not in (REFERENCE, UNFUSED) and "=" not in name), base.backends
    )

    def way(name: str) -> "Way":
        if name == REFERENCE:
            return "reference"
        if name == UNFUSED:
            return replace(base, backends=backends, skip=tuple(dict.fromkeys((*base.skip, *FUSIONS))))
        if "=" in name:
            return replace(base, backends=backends, mesh=read_mesh(name, "--backends"))
        return replace(base, backends=tuple(name.split("+")))

    return (names[0], names[1]), (way(names[0]), way(names[1]))


def token_ids(model: str, prompt: str, tokens: str | None) -> list[int]:
    """The ids that ``--tokens`` lists, or those of the prompt."""
    if tokens is None:
        from deltaloom.models.bundled import model_folder
        from deltaloom.models.config import read_config
        from deltaloom.runtime.tokenizer import Tokenizer

        folder = model_folder(model)
        return Tokenizer.from_folder(folder, read_config(folder).vocab_size).encode(prompt)
    parts = [part.strip() for part in tokens.split(",")]
    wrong = next((part for part in parts if not part.isdecimal() or len(part) > 15), None)
    require(wrong is None, f"--tokens has '{wrong}', expected token ids with commas between them, as 5,17,99", RequestError)
    return [int(part) for part in parts]


def _text(found: "Comparison") -> str:
    looked = f"{found.values} values, {found.states} states of {found.steps + 1} steps"
    lone = ", ".join(f"{count} only in {side}" for side, count in found.unmatched.items() if count)
    lines = [f"{found.a} against {found.b}: {looked}" + (f" ({lone})" if lone else "")]
    if found.finding is None:
        lines.append("nothing parts; largest of what is allowed:")
        lines += [f"  step {step}  {name}: {how}" for step, (name, how) in enumerate(found.largest)]
        return "\n".join(lines)
    first = found.finding
    when = "" if first.kind == "weight" else f" in step {first.step} ({'the prompt' if not first.step else 'decode'})"
    lines.append(f"the first {first.kind} that parts is {first.name}{when}: {first.difference}")
    for side, where in first.nodes.items():
        origins = f", from {listed(where.origins)}" if where.origins else ""
        rules = f", made by {listed(where.rules)}" if where.rules else ""
        kernel = where.kernel or "its definition"
        lines.append(f"  {side}: {where.op} on {kernel} in '{where.body}', {where.source}{origins}{rules}")
    lines.append(f"cause ({first.cause.side}): {first.cause.sentence}")
    if first.cause.interior:
        lines.append(f"  {first.cause.interior}")
    return "\n".join(lines)


def _object(found: "Comparison") -> dict[str, Any]:
    from deltaloom.runtime.repro import difference_facts

    plain = {key: value for key, value in vars(found).items() if key not in ("finding", "largest")}
    plain["largest"] = [{"name": name, **(difference_facts(how) or {})} for name, how in found.largest]
    first = found.finding
    if first is None:
        return {**plain, "finding": None}
    cause = {key: getattr(first.cause, key) for key in ("kind", "side", "name", "sentence", "interior")}
    return {
        **plain,
        "finding": {
            "kind": first.kind,
            "name": first.name,
            "step": first.step,
            "difference": difference_facts(first.difference),
            "nodes": {side: asdict(where) for side, where in first.nodes.items()},
            "cause": cause,
        },
    }


def _write(found: "Comparison", base: "CompileConfig", folder: Path, quiet: bool) -> None:
    from deltaloom.runtime.repro import write_repro
    from deltaloom.runtime.shrink import repro_of_cause

    if found.finding is None:
        if not quiet:
            print(f"nothing parts, so {folder} is not written")
        return
    write_repro(repro_of_cause(found.finding.cause, device=base.device, threads=base.threads), folder)
    if not quiet:
        print(f"written to {folder}; `deltaloom repro {folder}` tries it again")
