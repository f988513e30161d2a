"""What is exported: the layer graphs of a model, and, where there is a checkpoint, its tensors as the exporter asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends.onnx.flat import Weight
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray, copy_cast
from deltaloom.graph.types import DType, QuantType, f16, f32
from deltaloom.models.build import ModelGraphs, build_graph
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.safetensors_file import TensorInfo
from deltaloom.passes.quantise_policy import Policy
from deltaloom.runtime.compile import CompiledModel
from deltaloom.runtime.load import check_coverage, check_stored
from deltaloom.runtime.model import Model
from deltaloom.runtime.stages import GIVEN
from deltaloom.runtime.weights import VIEWS, materialise

Exportable = str | os.PathLike[str] | Model | CompiledModel | ModelGraphs | Graph
"""A checkpoint folder, a config.json alone, a bundled name; a loaded or compiled model; or layer graphs, which have no weights."""

MOST_READ = 1 << 26
"""Bytes of a weight after which its pages are given back."""

COMPUTE = {"float32": f32, "float16": f16, "bfloat16-storage": f32}
"""What a user asks for -> the dtype that the graph computes in."""


@dataclass(frozen=True)
class Source:
    """Graphs, weights (None: there are none), the model's configuration, and which weights are quantised how."""

    graphs: ModelGraphs
    weights: CheckpointWeights | None = None
    shape: ModelConfig | None = None
    policy: Policy = ()
    folder: Path | None = None

    def close(self) -> None:
        """Let go of the checkpoint's files."""
        if self.weights is not None:
            self.weights.close()


def read_source(model: Exportable, dtype: str, hf_overrides: Mapping[str, Any] | None = None) -> Source:
    """The graphs of ``model`` in the dtype that ``dtype`` computes in. ``ExportError`` for a dtype that cannot be exported, and
    whatever a checkpoint is refused for."""
    require(dtype in COMPUTE, f"dtype is {dtype!r}, expected {', '.join(COMPUTE)}", ExportError)
    if isinstance(model, Graph | ModelGraphs | CompiledModel):
        given = model.graph(GIVEN) if isinstance(model, CompiledModel) else model
        found = "a graph says itself what it computes in; export it with dtype 'float32', or build it in float16"
        require(dtype != "float16", found, ExportError)
        return Source(given if isinstance(given, ModelGraphs) else ModelGraphs(given))
    if isinstance(model, Model):
        return _checkpoint(model.folder, model.config, COMPUTE[dtype], model.ctx.config.policy)
    require(
        isinstance(model, str | os.PathLike),
        f"a model to export is {type(model).__name__}, expected a path or a graph",
        ExportError,
    )
    if os.fspath(model).endswith(".json"):
        shape = read_config(model, hf_overrides)
        return Source(build_graph(shape, dtype=COMPUTE[dtype]), shape=shape)
    folder = model_folder(model)
    return _checkpoint(folder, read_config(folder, hf_overrides), COMPUTE[dtype], ())


def _checkpoint(folder: Path, shape: ModelConfig, dtype: DType, policy: Policy) -> Source:
    checkpoint = Checkpoint.open(folder)
    graphs = build_graph(shape, dtype=dtype, names=checkpoint.names())
    check_coverage(shape, graphs, checkpoint).require_complete(f"the checkpoint {folder}")
    check_stored(graphs, checkpoint)
    return Source(graphs, CheckpointWeights(checkpoint), shape, policy, folder)


class CheckpointWeights:
    """The weights of a model in a checkpoint, for the exporter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.files = {checkpoint.info(name).file.resolve() for name in checkpoint.names()}

    def close(self) -> None:
        """Let go of the files."""
        self._checkpoint.close()

    def stored(self, weight: Weight, part: int) -> TensorInfo | None:
        """Where the tensor lies that the weight is, or (``part`` 1) its scales; None for one that is computed."""
        _, value = _made(weight)
        if value.kind != "param":
            return None
        info = self._checkpoint.info(weight.prefix + value.name + (SCALE_SUFFIX if part else ""))
        return info if part or info.shape == value.type.static_shape() else None

    def moved(self, weight: Weight) -> bool:
        """Whether the weight is stored tensors side by side."""
        return self._leaves(weight) is not None

    def loses(self, weight: Weight, dtype: DType) -> bool:
        """Whether a weight that is only moved is stored in something that does not fit into ``dtype``."""
        leaves = self._leaves(weight) or ()
        return any(np.promote_types(self._checkpoint.info(name).dtype, dtype.numpy) != dtype.numpy for name in leaves)

    def arrays(self, weight: Weight, part: int, dtype: DType) -> Iterator[Array]:
        """The weight, piece by piece: of experts that lie one by one in the checkpoint, one is in memory at a time."""
        graph, value = _made(weight)
        read = 0
        for piece in _pieces(graph, value):
            found = materialise(graph, piece, weight.prefix, self._checkpoint, ())
            array = found if not isinstance(found, QuantizedArray) else found.scale if part else found.data
            if array.dtype != dtype.numpy and not isinstance(found, QuantizedArray):
                narrow = np.empty(array.shape, dtype.numpy)
                copy_cast(array, narrow)
                array = narrow
            yield array
            read += array.nbytes
            if read > MOST_READ:
                self._checkpoint.forget()
                read = 0

    def _leaves(self, weight: Weight) -> tuple[str, ...] | None:
        """The stored tensors that the weight is made of; None where anything is computed or quantised."""
        graph, value = _made(weight)
        waiting, names = [value], list[str]()
        while waiting:
            at = waiting.pop()
            if isinstance(at.type.dtype, QuantType):
                return None
            if at.kind == "param":
                names.append(weight.prefix + at.name)
                continue
            node = graph.producers[at.name]
            if node.op.name not in (*VIEWS, "stack", "concat"):
                return None
            waiting += node.inputs
        return tuple(dict.fromkeys(names))


def _made(weight: Weight) -> tuple[Graph, Value]:
    """The weight graph and the value in it that is the weight."""
    assert weight.graph.weights is not None
    return weight.graph.weights, weight.graph.weights.output(weight.value.name)


def _pieces(graph: Graph, value: Value) -> Iterable[Value]:
    """Values that lie one after the other in memory where ``value`` does."""
    node = graph.producers.get(value.name) if value.kind == "node" else None
    joined = node is not None and (node.op.name == "stack" or node.op.name == "concat" and _in_front(node.op.attributes(), value))
    if node is None or not joined:
        return [value]
    form = value.type.dtype
    if node.op.name == "concat" and isinstance(form, QuantType):
        borders = list(accumulate(item.type.static_shape()[0] for item in node.inputs))[:-1]
        if not all(form.cuts(-value.type.rank, border) for border in borders):
            return [value]
    return [piece for item in node.inputs for piece in _pieces(graph, item)]


def _in_front(attributes: Mapping[str, Any], value: Value) -> bool:
    return bool(attributes["axis"] % value.type.rank == 0)
