"""The reference interpreter as an engine: a checkpoint's graphs run node by node, in float64 unless told otherwise."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaloom.graph.interpret import Observer, Results, interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray
from deltaloom.graph.types import DType, QuantType, f64
from deltaloom.models.build import ModelGraphs, build_graph
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import ModelConfig, read_config

Array = NDArray[Any]
States = Mapping[str, Array]


class ReferenceModel:
    """The model of a checkpoint folder, computing in ``dtype``."""

    def __init__(self, folder: Path, dtype: DType = f64) -> None:
        self.config: ModelConfig = read_config(folder)
        self.checkpoint = Checkpoint.open(folder)
        self.graphs: ModelGraphs = build_graph(self.config, dtype=dtype, names=self.checkpoint.names())
        self._read: dict[str, Array | QuantizedArray] = {}

    @cached_property
    def _types(self) -> dict[str, Any]:
        mtp = self.graphs.mtp.all_params() if self.graphs.mtp else {}
        return {**self.graphs.main.all_params(), **mtp}

    def parameter(self, name: str) -> Array | QuantizedArray:
        """A parameter in the dtype of the graph; block FP8 stays with its scales."""
        if name not in self._read:
            type_, stored = self._types[name], self.checkpoint.read(name)
            if isinstance(type_.dtype, QuantType):
                scale = np.asarray(self.checkpoint.read(name + SCALE_SUFFIX))
                self._read[name] = QuantizedArray(np.asarray(stored), scale, type_.dtype, type_.static_shape())
            else:
                self._read[name] = stored.astype(type_.dtype.numpy)
        return self._read[name]

    def start(self, graph: Graph, batch: int) -> dict[str, Array]:
        """Every state before the first token: zeros, caches empty."""
        sizes = {"batch": batch, "past": 0}
        types = {name: state.value.type.substitute(sizes) for name, state in graph.all_states().items()}
        return {name: np.zeros(type_.static_shape(), type_.plain_dtype.numpy) for name, type_ in types.items()}

    def run(self, graph: Graph, inputs: Mapping[str, Array], states: States, observe: Observer | None = None) -> Results:
        """One run of ``graph``; the states given are not changed."""
        return interpret(graph, inputs, self.parameter, states, observe=observe)
