"""A model on one rank by the reference interpreter and on several in lock step, run side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.types import DType
from deltaloom.models.build import ModelGraphs, build_graph
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.plans import shard_pass
from deltaloom.passes.pipeline import Context, Pass, run_pipeline
from deltaloom.passes.shard.layout import read_layout
from deltaloom.passes.table import SHARED, make_pass, step_name
from deltaloom.runtime.lockstep import LockStep
from deltaloom.runtime.weights import TensorSource

Array = np.ndarray[Any, np.dtype[Any]]


class Random:
    """A checkpoint that has every tensor, of small random numbers."""

    def __init__(self, graphs: ModelGraphs) -> None:
        self.types = {name: t for graph in (graphs.main, graphs.mtp) if graph for name, t in graph.all_params().items()}

    def read(self, name: str) -> Array:
        shape = self.types[name].static_shape()
        seed = sum(map(ord, name)) * 7919 + len(name)
        found: Array = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])
        return found


def open_model(folder: Path, dtype: DType) -> tuple[ModelConfig, ModelGraphs, TensorSource]:
    """The config, graphs and tensors of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    config = read_config(folder)
    return config, build_graph(config, dtype=dtype, names=checkpoint.names()), checkpoint


def optimised(graph: Graph, shard: Pass) -> Graph:
    """The graph after everything that the compiler does to the shared graph, ``shard`` in its place."""
    steps = [make_pass(step) for step in SHARED if step_name(step) != "shard"]
    return run_pipeline(graph, [steps[0], shard, *steps[1:]], Context()).graph


class Pair:
    """One graph of a model, on one rank as it was built and on ``tp`` ranks as ``prepare`` makes it."""

    def __init__(
        self, config: ModelConfig, graph: Graph, source: TensorSource, tp: int, batch: int, prepare: Any = optimised
    ) -> None:
        self.graph = graph
        self.source = source
        self.tp = tp
        self.types = graph.all_params()
        self.sharded: Graph = prepare(graph, shard_pass(config, {"tp": tp}))
        self.many = LockStep(self.sharded, {"tp": tp}, source)
        sizes = {"batch": batch, "past": 0}
        kinds = {name: state.value.type.substitute(sizes) for name, state in graph.all_states().items()}
        self.states: Mapping[str, Array] = {n: np.zeros(t.static_shape(), t.plain_dtype.numpy) for n, t in kinds.items()}
        self.many_states: Sequence[Mapping[str, Array]] = self.many.start(batch)

    def read(self, name: str) -> Array:
        return self.source.read(name).astype(self.types[name].plain_dtype.numpy)

    def step(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """One run of both; outputs and states by name, of the one and, put together, of the many."""
        one = interpret(self.graph, inputs, self.read, self.states)
        many = self.many.run(inputs, self.many_states)
        self.states, self.many_states = one.states, many.states
        found = dict(many.outputs)
        for name, state in self.sharded.all_states().items():
            layout = read_layout(state.value.sharding, state.value.type, self.tp)
            found[f"state {name}"] = layout.assemble([own[name] for own in many.states])
        wanted = {**one.outputs, **{f"state {name}": array for name, array in one.states.items()}}
        return wanted, found

    def values(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Every value that both have under one name, without carrying states on; of the many put together as their types say."""
        wanted: dict[str, Array] = {}
        found: dict[str, Array] = {}

        def watch(name: str, value: Value, arrays: Sequence[Array]) -> None:
            found[name] = read_layout(value.sharding, value.type, self.tp).assemble(arrays)

        interpret(self.graph, inputs, self.read, self.states, observe=wanted.__setitem__)
        self.many.run(inputs, self.many_states, observe=watch)
        return {name: wanted[name] for name in found if name in wanted}, found


def stream(ids: Array, chunks: Sequence[int]) -> list[dict[str, Array]]:
    """The inputs of runs over ``ids`` [batch, n], so many tokens each, without padding."""
    runs, past = [], 0
    for count in chunks:
        positions = np.broadcast_to(np.arange(past, past + count), (len(ids), count))
        valid = np.ones((len(ids), past + count), bool)
        runs.append({"token_ids": ids[:, past : past + count], "positions": positions, "valid": valid})
        past += count
    return runs
