"""The compile driver: one symbolic graph in, the programs that a runtime asks for out.

Which passes run, and in which order, is in ``deltaloom.passes.table``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deltaloom.graph.errors import DeltaloomError
from deltaloom.graph.ir import Graph
from deltaloom.passes.assign import LayoutKey
from deltaloom.passes.cache import CompileCache
from deltaloom.passes.cache_key import CacheKey, cache_key
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.emit import Program, emit
from deltaloom.passes.pipeline import Compiled, Context, Fuel, LedgerRow, Pass, Watch, run_pipeline
from deltaloom.passes.prepack import Conflict, decide_layouts
from deltaloom.passes.serving_layout import ServingVariant
from deltaloom.passes.shard.plan import Plan
from deltaloom.passes.stored import Decisions, Stored
from deltaloom.passes.table import SHARED as SHARED_STEPS
from deltaloom.passes.table import Step, make_pass

SHARED: tuple[Pass, ...] = tuple(step for step in map(make_pass, SHARED_STEPS) if not step.idle)
"""The standard passes of the shared part, for a model that is neither divided nor quantised."""


@dataclass(frozen=True)
class Variant:
    """Which program of a model: one token a step or many, with padding or without, and its outputs."""

    decode: bool
    padded: bool
    outputs: tuple[str, ...]

    @property
    def title(self) -> str:
        """The program and its outputs, as ledgers name it."""
        return f"{self} -> {', '.join(self.outputs)}"

    @property
    def facts(self) -> dict[str, object]:
        """What the passes of this program are given."""
        return {"outputs": self.outputs, "padded": self.padded, "seq": 1 if self.decode else None}

    def steps(self, config: CompileConfig) -> tuple[Step, ...]:
        """The passes from the shared graph to this program's."""
        return config.steps[1]

    def __str__(self) -> str:
        return f"{'decode' if self.decode else 'prefill'}{'_padded' if self.padded else ''}"


AnyVariant = Variant | ServingVariant


def plain_variants(outputs: tuple[str, ...]) -> tuple[Variant, Variant]:
    """Prefill and decode without padding, which decide the layouts of weights in most models."""
    return Variant(False, False, outputs), Variant(True, False, outputs)


def driver_key(graph: Graph, ctx: Context, *, planned: tuple[AnyVariant, ...], plan: Plan = ()) -> CacheKey:
    """Under which key a driver's results are kept."""
    return cache_key(graph, ctx, planned=planned, plan=plan)


class Driver:
    """Compiles the programs of one model graph on demand; all of them share weights in one layout.

    ``ledgers`` has a row for each pass that ran: of the ``"shared"`` part and of each program by its ``Variant.title``; those in
    ``cached`` came from the cache, with the times of the run that put them there. The rewrites of a program begin with what the
    shared part left of the configuration's fuel."""

    def __init__(
        self,
        graph: Graph,
        ctx: Context,
        *,
        planned: tuple[AnyVariant, ...],
        plan: Plan = (),
        cache: CompileCache | None = None,
    ) -> None:
        """``planned``: the variants whose kernels decide the layouts of weights; ``plan``: what a mesh divides."""
        self.name = graph.name
        self.ctx = replace(ctx, fuel=Fuel(ctx.config.fuel))
        self.stored = None if cache is None else Stored(cache, driver_key(graph, ctx, planned=planned, plan=plan))
        self.cached: set[str] = set()
        self.ledgers: dict[str, tuple[LedgerRow, ...]] = {}
        self.layouts: Mapping[LayoutKey, tuple[int, ...]]
        self.conflicts: tuple[Conflict, ...]
        self._graph = graph
        self._plan = plan
        self._shared: Compiled | None = None
        self._programs: dict[AnyVariant, Program] = {}
        decided = None if self.stored is None else self.stored.decisions()
        if decided is not None:
            self.cached.add("shared")
        else:
            decided = self._decide(planned)
        self.layouts, self.conflicts = decided.layouts, decided.conflicts
        self.ledgers["shared"] = decided.ledger
        self.ctx.fuel.left = decided.fuel

    @property
    def shared(self) -> Compiled:
        """The graph after the shared part of the pipeline."""
        if self._shared is None and "shared" in self.cached and self.stored is not None:
            self._shared = self.stored.shared()
        if self._shared is None:
            ctx = replace(self.ctx, fuel=Fuel(self.ctx.config.fuel))
            self._shared = run_pipeline(self._graph, self._shared_passes(), ctx)
            self.ctx.fuel.left = ctx.fuel.left
        return self._shared

    def program(self, variant: AnyVariant) -> Program:
        """The compiled program of ``variant``, made when first asked for."""
        if variant not in self._programs:
            self._programs[variant] = self._from_cache(variant) or self._compiled(variant)
        return self._programs[variant]

    def pass_names(self, variant: AnyVariant | None = None) -> tuple[str, ...]:
        """The passes that run: of the shared part, or of the program of ``variant`` after it."""
        return tuple(step.name for step in self.steps(variant))

    def steps(self, variant: AnyVariant | None = None) -> list[Pass]:
        """The passes of ``pass_names`` with their options, layouts of weights excepted."""
        return self._shared_passes() if variant is None else self._program_passes(variant, {})

    def trace(self, variant: AnyVariant | None = None) -> list[Graph]:
        """The graph after each of ``pass_names``, made anew; as placed programs have it, layouts of weights decided."""
        graphs: list[Graph] = []
        if variant is None:
            ctx = replace(self.ctx, fuel=Fuel(self.ctx.config.fuel))
            run_pipeline(self._graph, self._shared_passes(), ctx, watch=lambda _, graph: graphs.append(graph))
        else:
            self._place(variant, self.layouts, watch=lambda _, graph: graphs.append(graph))
        return graphs

    def _decide(self, planned: tuple[AnyVariant, ...]) -> Decisions:
        """Run the shared part and see which layouts the planned programs want."""
        shared = self.shared
        forks = [self._place(variant, {}, stop="assigned").graph for variant in planned]
        decided = Decisions(*decide_layouts(forks), self.ctx.fuel.left, shared.ledger)
        if self.stored is not None:
            self.stored.keep_shared(shared, decided)
        return decided

    def _from_cache(self, variant: AnyVariant) -> Program | None:
        found = None if self.stored is None else self.stored.program(variant.title, variant.outputs)
        if found is None or self.stored is None:
            return None
        try:
            program = emit(found.graph, self.ctx, str(variant))
        except DeltaloomError as error:
            self.stored.reject_program(variant.title, error)
            return None
        self.ledgers[variant.title] = found.ledger
        self.cached.add(variant.title)
        return program

    def _compiled(self, variant: AnyVariant) -> Program:
        done = self._place(variant, self.layouts)
        program = emit(done.graph, self.ctx, str(variant))
        self.ledgers[variant.title] = done.ledger
        if self.stored is not None:
            self.stored.keep_program(variant.title, done)
        return program

    def _place(
        self,
        variant: AnyVariant,
        layouts: Mapping[LayoutKey, tuple[int, ...]],
        *,
        stop: str = "",
        watch: Watch | None = None,
    ) -> Compiled:
        """The graph of ``variant`` after the program part of the pipeline, or after the first pass that establishes ``stop``."""
        shared = self.shared
        passes = self._program_passes(variant, layouts)
        last = next((i for i, step in enumerate(passes) if stop in step.establishes), len(passes))
        title = f"{variant}-{variant.outputs[-1] if variant.outputs else 'state'}"
        ctx = replace(self.ctx, fuel=replace(self.ctx.fuel))
        return run_pipeline(shared.graph, passes[: last + 1], ctx, properties=shared.properties, title=title, watch=watch)

    def _program_passes(self, variant: AnyVariant, layouts: Mapping[LayoutKey, tuple[int, ...]]) -> list[Pass]:
        return _passes(variant.steps(self.ctx.config), {**variant.facts, "layouts": layouts})

    def _shared_passes(self) -> list[Pass]:
        config = self.ctx.config
        facts = {
            "mesh": tuple(config.mesh.items()),
            "plan": self._plan,
            "policy": config.policy,
            "keep": config.keep_quantized,
        }
        return _passes(config.steps[0], facts)


def _passes(steps: tuple[Step, ...], facts: Mapping[str, Any]) -> list[Pass]:
    """The passes of ``steps``, each with those of the ``facts`` that it is given, less those that have nothing to do."""
    made = [make_pass(step) for step in steps]
    given = [replace(step, **{name: facts[name] for name in step.given}) for step in made]
    return [step for step in given if not step.idle]
