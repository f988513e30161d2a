"""Composition: a checkpoint becomes an ONNX model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom import __version__
from deltaloom.backends.onnx.functions import Library
from deltaloom.backends.onnx.model import ModelBuilder, Weight, portable_names
from deltaloom.backends.onnx.weights import WeightMode, initializers
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.models.build import build_graph
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import read_config
from deltaloom.models.safetensors_file import TensorInfo
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.passes.table import make_pass
from deltaloom.runtime.weights import materialise

OPSET = 21


@dataclass(frozen=True)
class ExportResult:
    """What was written: the model's path, names of its inputs, outputs and functions, and which weights lie where."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    functions: tuple[str, ...]
    opset: int
    ir_version: int
    weights: str
    extra: tuple[str, ...]


class CheckpointWeights:
    """The weights of a model in a checkpoint, for the exporter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.files = {checkpoint.info(name).file.resolve() for name in checkpoint.names()}

    def stored(self, weight: Weight) -> TensorInfo | None:
        """Where the tensor lies that the weight is."""
        assert weight.graph.weights is not None
        value = weight.graph.weights.output(weight.value.name)
        return self._checkpoint.info(weight.prefix + value.name) if value.kind == "param" else None

    def array(self, weight: Weight) -> Array:
        """The weight as the graph needs it."""
        assert weight.graph.weights is not None
        value = weight.graph.weights.output(weight.value.name)
        found = materialise(weight.graph.weights, value, weight.prefix, self._checkpoint, ())
        assert not isinstance(found, QuantizedArray)
        return found


def export_onnx(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    outputs: Sequence[str] = ("logits",),
    weights: WeightMode = "auto",
) -> ExportResult:
    """Write a model in float32 as ONNX; one graph serves prefill, chunks and decode, with every state an input and an output.

    ``outputs``: names of the layer graph's outputs. ``weights``: "reference" leaves them in the checkpoint's files, which then have
    to lie in the model's folder; "copy" writes them beside the model; "inline" puts them into it; "none" makes them inputs; "auto"
    refers to them where that can be, else copies. Raises ``ExportError`` and whatever a checkpoint is refused for; a file that was
    not finished is not left behind."""
    folder, target = model_folder(model), Path(path)
    shape = read_config(folder)
    with Checkpoint.open(folder) as checkpoint:
        graph = build_graph(shape, names=checkpoint.names()).main
        return write_graph(prepared(graph, outputs), target, CheckpointWeights(checkpoint), weights)


def prepared(graph: Graph, outputs: Sequence[str]) -> Graph:
    """The layer graph before anything of a backend: tidied, with its weights lifted, and these outputs alone."""
    select = replace(make_pass("select_outputs"), outputs=tuple(outputs))  # type: ignore[call-arg]
    return run_pipeline(graph, [make_pass("canonicalise"), make_pass("lift_weights"), select], Context()).graph


def write_graph(graph: Graph, target: Path, source: CheckpointWeights, mode: WeightMode) -> ExportResult:
    """Build everything, then write all files, each under a temporary name first. What no file of the checkpoint holds as it is
    needed goes to ``NAME.derived.safetensors`` beside ``NAME.onnx``."""
    extra = target.with_name(f"{target.stem}.derived.safetensors")
    for file in (target, extra):
        require(file.resolve() not in source.files, f"{file} is a file of the checkpoint; give the model another name", ExportError)
    library = Library(OPSET)
    model = ModelBuilder(graph, library, portable_names).build()
    made = initializers(model.weights, source, mode, target.parent, extra.name)
    model.inputs += made.inputs
    proto = model.proto(graph.name, OPSET, __version__, made.tensors, made.casts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
            here = Path(scratch)
            made.write(here / extra.name)
            (here / target.name).write_bytes(proto.SerializeToString())
            if made.written:
                os.replace(here / extra.name, extra)
            os.replace(here / target.name, target)
    except OSError as problem:
        raise ExportError(f"{target} cannot be written: {problem.strerror}") from problem
    return ExportResult(
        target, tuple(v.name for v in model.inputs), tuple(v.name for v in model.outputs), tuple(library.functions),
        OPSET, proto.ir_version, made.mode, tuple(made.written),
    )  # fmt: skip
