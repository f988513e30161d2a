"""Composition: a model, a part of it or a graph becomes an ONNX model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom import __version__
from deltaloom.backends.onnx.cut import cut, only_op
from deltaloom.backends.onnx.flat import Flat, flatten
from deltaloom.backends.onnx.functions import Library
from deltaloom.backends.onnx.model import ModelBuilder, file_of
from deltaloom.backends.onnx.names import OUTPUTS, naming
from deltaloom.backends.onnx.profiles import Profile
from deltaloom.backends.onnx.profiles import profile as profile_named
from deltaloom.backends.onnx.weights import Initializers, initializers
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType, bf16
from deltaloom.models.json_fields import as_path
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.passes.quantise_policy import Policy, check_matches, parameter_names, quantise_policy
from deltaloom.passes.table import make_pass
from deltaloom.runtime.genai_config import CONFIG_FILE
from deltaloom.runtime.genai_config import genai_config as genai_config_of
from deltaloom.runtime.onnx_files import Writer, check_targets, write_files
from deltaloom.runtime.onnx_source import Exportable, Source, read_source

if TYPE_CHECKING:
    from deltaloom.runtime.onnx_cases import Subject
    from deltaloom.runtime.onnx_verify import VerifyReport

MTP_FILE = "mtp.onnx"
SUFFIX = ".onnx"


@dataclass(frozen=True)
class ExportResult:
    """What was written. ``path``: the model; ``files``: all files, its own last; ``weights``: where they lie; ``derived``: names of
    weights that no tensor of the checkpoint is; ``warnings``: sentences on what a user may not expect; ``mtp``: the MTP head;
    ``report``: what verification found, if it was asked for."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    functions: tuple[str, ...]
    profile: str
    opset: int
    ir_version: int
    weights: str
    derived: tuple[str, ...]
    files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()
    mtp: ExportResult | None = None
    report: VerifyReport | None = None


@dataclass(frozen=True)
class _Request:
    """What is asked for."""

    profile: Profile
    functions: bool
    weights: str
    storage: DType | None
    state_names: str
    nodes: str | Sequence[str] | None
    op: str | None
    outputs: Sequence[str] | None
    mtp: bool
    genai_config: bool

    @property
    def whole(self) -> bool:
        """Whether all of the graph is asked for."""
        return self.nodes is None and self.op is None

    def check(self) -> None:
        """``ExportError`` for options that contradict each other."""
        both = f"nodes ({self.nodes}) and op ({self.op}) both say what to export; give one of them"
        require(self.nodes is None or self.op is None, both, ExportError)
        found = "the MTP head is written beside a whole model; leave nodes and op out"
        require(self.whole or not self.mtp, found, ExportError)
        require(self.whole or not self.genai_config, "genai_config describes a whole model; leave nodes and op out", ExportError)


@dataclass(frozen=True)
class _Made:
    """A model that is ready to be written."""

    result: ExportResult
    writers: Mapping[Path, Writer]


def export_onnx(
    model: Exportable,
    path: str | os.PathLike[str],
    *,
    profile: str = "portable",
    opset: int | None = None,
    functions: bool = True,
    weights: str = "auto",
    dtype: str = "float32",
    nodes: str | Sequence[str] | None = None,
    op: str | None = None,
    outputs: Sequence[str] | None = None,
    state_names: str = "portable",
    mtp: bool = False,
    genai_config: bool = False,
    quantise: str | Mapping[str, str] | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> ExportResult:
    """Write a model, a part of it or a graph as ONNX; one file serves prefill, chunks and decode, with every state an input and an
    output.

    ``profile``: "portable" (standard ops, opset 21), "modern" (opset 24) or "ort" (ONNX Runtime's own ops too); ``opset`` asks for
    a newer one. ``functions=False`` writes a flat graph. ``weights``: "reference" leaves them in the checkpoint's files, which then
    have to lie in the model's folder or below; "copy" writes them beside the model; "inline" puts them into it; "none" makes them
    inputs; "auto" refers to them where that can be, else copies, and makes them inputs where there are none. ``dtype``: "float32",
    "float16", or "bfloat16-storage", which computes in float32 with weights kept in bfloat16. ``nodes``: the part to export, as
    ``deltaloom.backends.onnx.cut`` reads it; ``op``: the first node of that op alone. ``outputs``: names of the graph's outputs, by
    default the logits of a model and all of another graph. ``state_names``: "portable", "genai" or "transformersjs". ``mtp``: write
    the MTP head too, as mtp.onnx beside the model, which then gives its hidden states; ``genai_config``: genai_config.json too,
    with which onnxruntime-genai generates. ``quantise``: as in ``CompileConfig``; what
    a checkpoint stores quantised always stays so. ``verify``: check what was written (``deltaloom.runtime.onnx_verify``), which
    ``report`` of the result then says; a whole model is loaded for it.

    Raises ``ExportError`` and whatever a checkpoint is refused for, before any file is written; a file that was not finished is not
    left behind, and no file of the checkpoint is overwritten."""
    require(isinstance(path, str | os.PathLike), f"the model's file is {path!r}, expected a path", ExportError)
    target = as_path(path, ExportError)
    require(target.suffix == SUFFIX, f"the model's file is {str(target)!r}, expected a name that ends in {SUFFIX}", ExportError)
    naming(state_names)
    storage = bf16 if dtype == "bfloat16-storage" else None
    version = profile_named(profile, opset)
    request = _Request(version, functions, weights, storage, state_names, nodes, op, outputs, mtp, genai_config)
    request.check()
    source = read_source(model, dtype, hf_overrides)
    try:
        source = _quantised(source, quantise)
        result = _export(source, target, request)
        subject = _subject(result, source, request) if verify else None
    finally:
        source.close()
    if not verify:
        return result
    return replace(result, report=_verified(result, source, subject, request, dtype, quantise, hf_overrides))


def _subject(result: ExportResult, source: Source, request: _Request) -> Subject | None:
    """What is verified by the definitions of its ops: all but a whole checkpoint."""
    from deltaloom.runtime.onnx_cases import subject_of

    if request.whole and source.folder is not None and result.weights != "none" and source.weights:
        return None
    whole = flatten(prepared(source.graphs.main, _outputs(source.graphs.main, request), source.policy))
    return subject_of(_chosen(whole, request), whole, source, rounded=request.storage is not None)


def _verified(
    result: ExportResult,
    source: Source,
    subject: Subject | None,
    request: _Request,
    dtype: str,
    quantise: str | Mapping[str, str] | None,
    hf_overrides: Mapping[str, Any] | None,
) -> VerifyReport:
    """What verification finds; a whole checkpoint is loaded as NumPy runs it."""
    from deltaloom.runtime.load import load
    from deltaloom.runtime.onnx_verify import verify_export

    if subject is not None:
        return verify_export(result, None, dtype, subject=subject, one_op=request.op is not None)
    assert source.folder is not None
    config = CompileConfig(dtype="float32", quantise=quantise or {}, keep_quantized=True)
    report = verify_export(result, load(source.folder, config=config, hf_overrides=hf_overrides), dtype)
    if result.mtp is not None:
        rows = verify_export(result.mtp, None, dtype).rows
        report.rows += [replace(row, case=f"{result.mtp.path.name}: {row.case}") for row in rows]
    return report


def _export(source: Source, target: Path, request: _Request) -> ExportResult:
    """Make all models, then write all files."""
    flat = flatten(prepared(source.graphs.main, _outputs(source.graphs.main, request), source.policy))
    found = [_model(_chosen(flat, request), target, source, request)]
    mtp = MTP_FILE if request.mtp else None
    if mtp is not None:
        require(target.name != mtp, f"{mtp} is the name of the MTP head's file; give the model another one", ExportError)
        found.insert(0, _mtp(source, target.with_name(mtp), request))
    writers = {file: write for one in found for file, write in one.writers.items()}
    if request.genai_config:
        writers = {target.with_name(CONFIG_FILE): _genai(source, request, target.name, mtp), **writers}
    check_targets(writers, source.weights.files if source.weights else ())
    write_files(writers)
    files = tuple(file for file in writers if mtp is None or file not in found[0].writers)
    return replace(found[-1].result, files=files, mtp=None if mtp is None else found[0].result)


def _chosen(flat: Flat, request: _Request) -> Flat:
    """The part that is asked for."""
    if request.nodes is not None:
        return cut(flat, request.nodes)
    return flat if request.op is None else only_op(flat, request.op)


def _quantised(source: Source, quantise: str | Mapping[str, str] | None) -> Source:
    """``source`` with another policy, if one is given."""
    if quantise is None:
        return source
    policy = quantise_policy(quantise)
    graphs = [graph for graph in (source.graphs.main, source.graphs.mtp) if graph is not None]
    check_matches(policy, (pair for graph in graphs for pair in parameter_names(graph)))
    return replace(source, policy=policy)


def _outputs(graph: Graph, request: _Request) -> tuple[str, ...]:
    """The outputs to compute: of parts, all that a name may speak of."""
    known = tuple(name for name, _ in graph.outputs)
    if request.outputs is not None:
        for name in request.outputs:
            require(name in known, f"graph '{graph.name}' has no output '{name}'; it has {', '.join(known)}", ExportError)
        require(bool(request.outputs), "outputs is empty; name at least one", ExportError)
        return tuple(request.outputs)
    if "logits" not in known:
        return known
    return ("logits", "final_norm") if (request.mtp or not request.whole) and "final_norm" in known else ("logits",)


def prepared(graph: Graph, outputs: Sequence[str], policy: Policy = ()) -> Graph:
    """The layer graph before anything of a backend: tidied, stored codes kept, with its weights lifted, and these outputs alone."""
    placed = [n for one in (graph, *graph.regions.values()) for n in one.nodes if n.placement is not None]
    if placed or graph.weights is not None:
        return graph
    select = replace(make_pass("select_outputs"), outputs=tuple(outputs))  # type: ignore[call-arg]
    quantise = replace(make_pass("quantise"), policy=policy, keep=True)  # type: ignore[call-arg]
    return run_pipeline(graph, [make_pass("canonicalise"), quantise, make_pass("lift_weights"), select], Context()).graph


def _genai(source: Source, request: _Request, model: str, mtp: str | None) -> Writer:
    """What writes genai_config.json."""
    if source.shape is None:
        raise ExportError("genai_config describes a checkpoint's model; a graph alone does not say enough for it")
    found = f"state_names is '{request.state_names}', and onnxruntime-genai knows 'portable' and 'genai' ones"
    require(request.state_names in ("portable", "genai"), found, ExportError)
    content = genai_config_of(source.shape, source.folder, naming(request.state_names), model, mtp)
    return lambda path: path.write_bytes(content)


def _mtp(source: Source, target: Path, request: _Request) -> _Made:
    """The MTP head's model."""
    graph = source.graphs.mtp
    if graph is None:
        raise ExportError(f"graph '{source.graphs.main.name}' has no MTP head to export; leave mtp out")
    return _model(flatten(prepared(graph, ("logits", "hidden"), source.policy)), target, source, request)


def _model(flat: Flat, target: Path, source: Source, request: _Request) -> _Made:
    """Build a model without writing anything. Raises all that can be wrong with it."""
    library = Library(request.profile)
    public = OUTPUTS if source.shape is not None else {}
    built = ModelBuilder(flat, library, naming(request.state_names), outputs=public).build()
    made = initializers(built.weights, source.weights, request.weights, target, storage=request.storage)
    built.inputs += made.inputs
    proto = built.proto(flat.graph.name, request.profile.opset, __version__, made.tensors, made.casts)
    file = file_of(proto, functions=request.functions)
    files: dict[Path, Writer] = {one.path: one.write for one in made.files}
    files[target] = lambda path: path.write_bytes(file.content)
    result = ExportResult(
        target, file.inputs, file.outputs, file.functions, request.profile.name, request.profile.opset, file.ir_version,
        made.mode, tuple(made.derived), tuple(files), _warnings(made, request),
    )  # fmt: skip
    return _Made(result, files)


def _warnings(made: Initializers, request: _Request) -> tuple[str, ...]:
    found = []
    if made.mode == "none" and request.weights == "auto" and made.inputs:
        found.append(f"there are no weights, so {len(made.inputs)} inputs of the model are weights")
    if made.rounded:
        found.append(
            f"{len(made.rounded)} weights are rounded to bfloat16, because the checkpoint has more digits: {made.rounded[0]}, …"
        )
    return tuple(found)
