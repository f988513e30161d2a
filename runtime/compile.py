"""Composition without weights: a graph and a configuration become compiled programs, to look at or to give weights and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom.backends import backend as make_backend
from deltaloom.graph.diff import diff
from deltaloom.graph.errors import CheckpointError, CompileError, ConfigError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.registry import ops
from deltaloom.models.config import ModelConfig
from deltaloom.models.families import family_named, names
from deltaloom.passes.cache import cache_of
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import AnyVariant, Driver, Variant, plain_variants
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Backend
from deltaloom.passes.pipeline import Context, LedgerRow
from deltaloom.passes.serving_layout import BLOCK_SIZE, ServingKind, ServingVariant
from deltaloom.passes.shard.plan import Plan
from deltaloom.runtime.executor import Executor
from deltaloom.runtime.explanation import Explanation, KernelRow, explanation, kernel_rows
from deltaloom.runtime.node_facts import NodeFacts, node_facts
from deltaloom.runtime.overview import CONTEXT, Overview, overview
from deltaloom.runtime.stages import SHARED, Stages
from deltaloom.runtime.weights import WeightStore

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")
ProgramName = Literal["prefill", "decode", "mixed", "serving_decode", "verify"]
"""The programs of a model: two over ``[batch, seq]``, and three over packed sequences and pools."""
PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)
VERIFY_DRAFTS = 3
"""Drafts of the program ``verify`` where none are said."""


class CompiledModel:
    """The programs of a graph, compiled when first asked for: ``"prefill"`` for any number of tokens, ``"decode"`` for one.

    ``driver`` is what made them; ``driver.conflicts`` lists weights whose layout kernels disagreed on."""

    def __init__(self, graph: Graph, driver: Driver, *, outputs: tuple[str, ...] | None = None) -> None:
        """``outputs`` of the programs where a call names none; None: all of the graph's."""
        self._given = graph
        self._outputs = tuple(name for name, _ in graph.outputs) if outputs is None else outputs
        self.driver = driver
        self.stages = Stages(graph, driver, {name: self._variant(name) for name in PROGRAMS})

    def _variant(self, name: ProgramName) -> AnyVariant:
        if name == "prefill" or name == "decode":
            return Variant(name == "decode", False, self._outputs)
        kind: ServingKind = "decode" if name == "serving_decode" else name
        return ServingVariant(kind, self._outputs, VERIFY_DRAFTS if kind == "verify" else 0)

    def named(self, name: str) -> Program:
        """One of ``PROGRAMS`` with the usual outputs, ``verify`` with ``VERIFY_DRAFTS`` drafts. ``CompileError`` for any other."""
        for known in PROGRAMS:
            if name == known:
                return self.driver.program(self._variant(known))
        raise CompileError(f"there is no program '{name}'; there is {', '.join(PROGRAMS)}")

    def program(self, kind: Kind, *, outputs: Sequence[str] | None = None, padded: bool = False) -> Program:
        """A program that gives ``outputs`` (the usual ones if None); ``padded`` takes the ``valid`` input."""
        require(kind in KINDS, f"there is no program '{kind}'; there is prefill and decode", CompileError)
        wanted = self._outputs if outputs is None else tuple(outputs)
        for name in wanted:
            self._given.output(name)
        return self.driver.program(Variant(kind == "decode", padded, wanted))

    def serving(
        self, kind: ServingKind, *, outputs: Sequence[str] | None = None, drafts: int = 0, block_size: int = BLOCK_SIZE
    ) -> Program:
        """A program over packed sequences and pools (``deltaloom.ops.serving``): ``"mixed"``, ``"decode"`` or ``"verify"`` with
        ``drafts`` tokens to check. It gives ``outputs`` (the usual ones if None)."""
        wanted = self._outputs if outputs is None else tuple(outputs)
        for name in wanted:
            self._given.output(name)
        return self.driver.program(ServingVariant(kind, wanted, drafts, block_size))

    def source(self, program: str) -> str:
        """One of ``PROGRAMS`` as Python that runs where it is pasted into a file."""
        return self.named(program).source

    def graph(self, stage: str = SHARED) -> Graph:
        """The graph at one of ``stages.names()``: as it was ``"given"``, after a pass, ``"shared"``, or placed for a program."""
        return self.stages.graph(stage)

    def diff(self, before: str, after: str) -> str:
        """What changed in the graph between two stages, as text; "" for nothing."""
        return diff(self.graph(before), self.graph(after))

    def node(self, name: str, program: str = "decode") -> NodeFacts:
        """Everything known of a node of a program (or of the graph at a stage): see ``deltaloom.runtime.node_facts``."""
        return node_facts(self.stages, program, name)

    def overview(self, *, batch: int = 1, context: int = CONTEXT) -> Overview:
        """Parameters, states and the work of a decode step, part by part: see ``deltaloom.runtime.overview``."""
        return overview(self._given, self.program("decode").graph, batch=batch, context=context)

    @property
    def ledger(self) -> Mapping[str, tuple[LedgerRow, ...]]:
        """What each pass did: of the shared part, of prefill and of decode."""
        for kind in KINDS:
            self.program(kind)
        return dict(self.driver.ledgers)

    def explain(self, program: str) -> list[KernelRow]:
        """Which kernel runs each node of a program, and who refused it why."""
        return kernel_rows(self.named(program))

    def explanation(self, programs: Sequence[ProgramName] = KINDS) -> Explanation:
        """Why these programs are as they are: kernels, rewrites, layouts, transfers, compiled functions."""
        return explanation(self.driver, {name: self._variant(name) for name in programs})

    def bind(self, weights: Mapping[str, Array]) -> Executor:
        """The programs with weights, by their full names in the checkpoint: ``new_state`` and ``run``."""
        backends = {backend.name: backend for backend in self.driver.ctx.backends}
        return Executor(self.driver, WeightStore(_Arrays(weights), backends), planned=self._outputs)


class _Arrays:
    """Weights from memory."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def read(self, name: str) -> Array:
        if name not in self._arrays:
            raise CheckpointError(f"the weights have no '{name}'; they have {len(self._arrays)} others")
        return self._arrays[name]


def compile(graph: Graph, config: CompileConfig | None = None, *, plan: Plan | None = None) -> CompiledModel:
    """Compile a layer graph: one of ``deltaloom.build_graph``, or one made with the builder.

    ``plan`` says which parameters the configuration's mesh divides; None: what is known for the family that the graph is named
    after. Raises ``ConfigError`` or ``CompileError``.
    """
    options = config or CompileConfig()
    ctx = Context(options, backends_of(options))
    variants = plain_variants(tuple(name for name, _ in graph.outputs))
    driver = Driver(graph, ctx, planned=variants, plan=plan_for(graph, options, plan), cache=cache_of(options))
    return CompiledModel(graph, driver)


def plan_for(graph: Graph, config: CompileConfig, plan: Plan | None = None) -> Plan:
    """What a mesh divides in ``graph``: ``plan``, or the plan of its family. ``ConfigError`` where a mesh has neither."""
    if plan is not None or all(ranks == 1 for ranks in config.mesh.values()):
        return plan or ()
    name = graph.name.removesuffix("_mtp")
    known = f"known are {', '.join(names())}; give compile() a plan"
    require(name in names(), f"nothing says how a mesh divides the graph '{graph.name}'; {known}", ConfigError)
    found = family_named(name, config.use).plan
    require(bool(found), f"the family '{graph.name}' does not say what of it a mesh divides; give compile() a plan", ConfigError)
    return found


def context(config: CompileConfig, shape: ModelConfig) -> Context:
    """The backends of a configuration, with ``dtype="auto"`` resolved: float32 on a CPU, the checkpoint's on an accelerator."""
    backends = backends_of(config)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if all(one.device == "cpu" for one in backends) else shape.dtype
    for one in backends:
        one.compute_dtype(dtype)
    return Context(replace(config, dtype=dtype), backends)


def backends_of(config: CompileConfig) -> tuple[Backend, ...]:
    """The backends of a configuration, in order; ``ConfigError`` for an override of an op that does not exist."""
    for op in config.kernels:
        require(op in ops, f"kernels.{op}: there is no op '{op}'; `deltaloom ops` lists them", ConfigError)
    return tuple(make_backend(name, device=config.device, threads=config.threads, use=config.use) for name in config.backends)
