"""``deltaloom export``: a model, a part of it or one op as an ONNX model.

Exit codes: 0 written (and verified), 1 it cannot be exported, 2 a wrong flag, or written and found wrong by ``--verify``.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.cli.output import listed, print_json
from deltaloom.cli.table import columns
from deltaloom.graph.errors import DeltaloomError, ExportError, require

if TYPE_CHECKING:
    from deltaloom.runtime.onnx_coverage import OnnxCoverage
    from deltaloom.runtime.onnx_export import ExportResult

FAILED, WRONG = 1, 2


def export(
    model: options.Looked = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for model.onnx (OP.onnx with --op), or a file NAME.onnx.", metavar="DIR"),
    ] = None,
    profile: Annotated[str, typer.Option("--profile", help="portable, modern or ort.")] = "portable",
    opset: Annotated[int | None, typer.Option("--opset", help="A newer opset than the profile's.")] = None,
    nodes: Annotated[
        str | None,
        typer.Option("--nodes", help="A part: layers.3, a node, FIRST:LAST, or IN,IN->OUT; several by comma.", metavar="PART"),
    ] = None,
    op: Annotated[str | None, typer.Option("--op", help="The first node of an op alone.", metavar="NAME")] = None,
    functions: Annotated[bool, typer.Option("--functions/--no-functions", help="A function for each op, or a flat graph.")] = True,
    weights: Annotated[str, typer.Option("--weights", help="auto, reference, copy, inline or none.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16-storage.")] = "float32",
    quantise: options.Quantise = None,
    state_names: Annotated[str, typer.Option("--state-names", help="portable, genai or transformersjs.")] = "portable",
    mtp: Annotated[bool, typer.Option("--mtp", help="Write the MTP head too, as mtp.onnx.")] = False,
    genai_config: Annotated[
        bool, typer.Option("--genai-config", help="Write genai_config.json for onnxruntime-genai too.")
    ] = False,
    hf_overrides: options.HfOverrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the file, and its results beside ours; exits with 2 where it is wrong.")
    ] = False,
    list_ops: Annotated[
        bool, typer.Option("--list-ops", help="Show which ops can be exported in which profile, and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model, a part of it or one op as ONNX, with all states as inputs and outputs."""
    try:
        if list_ops:
            show_ops(as_json=as_json)
            return
        require(output is not None, "nothing says where to write to; give a folder with -o", ExportError)
        assert output is not None
        from deltaloom.cli.settings import Settings
        from deltaloom.runtime.onnx_export import export_onnx

        settings = Settings({"model": model, "quantise": quantise, "hf_overrides": hf_overrides}, None)
        result = export_onnx(
            settings.value("model", "model"), model_file(output, op), profile=profile, opset=opset, functions=functions,
            weights=weights, dtype=dtype, nodes=nodes, op=op, state_names=state_names, mtp=mtp, genai_config=genai_config,
            quantise=settings.value("compile", "quantise") or None, hf_overrides=settings.value("model", "hf_overrides"),
            verify=verify,
        )  # fmt: skip
    except DeltaloomError as error:
        print("\n".join([f"deltaloom: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        raise typer.Exit(FAILED) from None
    show(result, as_json=as_json)
    if result.report is not None and not result.report.ok:
        print("\n".join(f"deltaloom: {failure}" for failure in result.report.failures), file=sys.stderr)
        raise typer.Exit(WRONG)


def model_file(output: Path, op: str | None) -> Path:
    """The file that ``-o`` means."""
    return output if output.suffix == ".onnx" else output / f"{op or 'model'}.onnx"


def show(result: "ExportResult", *, as_json: bool) -> None:
    """What was written."""
    every = [one for one in (result, result.mtp) if one is not None]
    if as_json:
        print_json("export", {"models": [as_object(one) for one in every]})
        return
    for one in every:
        rows = [
            ("wrote", ", ".join(str(file) for file in reversed(one.files))),
            ("profile", f"{one.profile}, opset {one.opset}, IR {one.ir_version}"),
            ("inputs", f"{len(one.inputs)}: {listed(one.inputs)}"),
            ("outputs", f"{len(one.outputs)}: {listed(one.outputs)}"),
            ("functions", f"{len(one.functions)}: {listed(one.functions)}" if one.functions else "none, the graph is flat"),
            ("weights", one.weights + (f", {len(one.derived)} of them derived" if one.derived else "")),
        ]
        rows += [("note", warning) for warning in one.warnings]
        if one.report is not None:
            checks, worst = one.report.rows, max(one.report.rows, key=lambda row: row.error)
            good = sum(row.ok for row in checks)
            rows.append(("verified", f"{good} of {len(checks)} checks hold, largest error {worst.error:.2g} ({worst.case})"))
        print(columns(rows))


def as_object(result: "ExportResult") -> dict[str, Any]:
    """The result as JSON."""
    fields = {key: value for key, value in vars(result).items() if key not in ("mtp", "report")}
    if result.report is not None:
        fields["verified"] = [{**vars(row), "ok": row.ok} for row in result.report.rows]
    return {**fields, "path": str(result.path), "files": [str(file) for file in result.files]}


def show_ops(*, as_json: bool) -> None:
    """The table of ops and profiles."""
    from deltaloom.runtime.onnx_coverage import onnx_coverage

    found = onnx_coverage()
    if as_json:
        print_json("onnx_ops", {"ops": [{"op": row.op, "status": dict(row.status), "reason": row.reason} for row in found]})
    else:
        print(table(found))


def table(found: "tuple[OnnxCoverage, ...]") -> str:
    """One line an op."""
    profiles = list(found[0].status)
    return columns([["op", *profiles, ""], *([row.op, *row.status.values(), row.reason] for row in found)])
