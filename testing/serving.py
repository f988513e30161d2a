"""Serving programs of a checkpoint beside its base programs, run step by step, so that both can be compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.models.build import build_graph
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import read_config
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Driver
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Tensor
from deltaloom.passes.serving_layout import ServingVariant
from deltaloom.runtime.compile import context
from deltaloom.runtime.packing import Segment, pack
from deltaloom.runtime.pools import StatePools
from deltaloom.runtime.weights import WeightStore


class ServedModel:
    """The serving programs of one model graph (``part``: "main" or "mtp"), with weights and poisoned pools."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        part: str = "main",
        backend: str = "numpy",
        dtype: str = "float64",
        outputs: Sequence[str] = ("last_logits",),
        block_size: int = 4,
        drafts: int = 3,
        skip: tuple[str, ...] = (),
        quantise: str | None = None,
    ) -> None:
        """``skip``: passes to leave out; ``quantise`` as in ``CompileConfig``."""
        config = read_config(folder)
        self.ctx = context(CompileConfig(backends=(backend,), dtype=dtype, threads=1, skip=skip, quantise=quantise or {}), config)
        checkpoint = Checkpoint.open(folder)
        graphs = build_graph(config, dtype=self.ctx.backends[0].compute_dtype(dtype), names=checkpoint.names())
        graph = graphs.main if part == "main" else graphs.mtp
        assert graph is not None, f"{folder} has no MTP head"
        self.block_size = block_size
        self._store = WeightStore(checkpoint, {b.name: b for b in self.ctx.backends})
        variants = [ServingVariant("mixed", tuple(outputs), 0, block_size), ServingVariant("decode", tuple(outputs), 0, block_size)]
        variants.append(ServingVariant("verify", tuple(outputs), drafts, block_size))
        driver = Driver(graph, self.ctx, planned=tuple(variants))
        self.programs: dict[int | None, Program] = {each.tokens_each: driver.program(each) for each in variants}
        self._weights = {each: self._bound(graph.name, program) for each, program in self.programs.items()}

    def pools(self, *, slots: int, blocks: int) -> StatePools:
        """Fresh pools, poisoned."""
        backends = {b.name: b for b in self.ctx.backends}
        return StatePools(list(self.programs.values()), backends, slots=slots, blocks=blocks, poison=True)

    def step(
        self,
        pools: StatePools,
        segments: Sequence[Segment],
        *,
        tokens_each: int | None = None,
        inputs: Mapping[str, Array] | None = None,
        seqs: int | None = None,
        tokens: int | None = None,
    ) -> dict[str, Array]:
        """One step of the program for ``tokens_each`` tokens a sequence; ``inputs`` replace or add to the packed ones, and ``seqs``
        and ``tokens`` pad. Gives the outputs as host arrays."""
        given = pack(segments, block_size=self.block_size, tokens_each=tokens_each, seqs=seqs, tokens=tokens)
        given.update(inputs or {})
        program, home = self.programs[tokens_each], self.ctx.backends[0]
        arguments = [home.from_host(given[v.name].astype(v.type.plain_dtype.numpy)) for v in program.graph.inputs]
        results = program.run(*arguments, self._weights[tokens_each], pools.fixed, pools.append)
        return {name: np.array(home.to_host(tensor)) for name, tensor in zip(program.outputs, results, strict=True)}

    def _bound(self, owner: str, program: Program) -> dict[str, tuple[Tensor, ...]]:
        def weights(prefix: str, graph: Graph) -> tuple[Tensor, ...]:
            slots = program.signatures["" if graph is program.graph else graph.name].weights
            return tuple(self._store.get(owner, prefix, graph, slot) for slot in slots)

        return {one.prefix: weights(one.prefix, one.graph) for one in program.graph.instances()}
